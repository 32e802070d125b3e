"""Which of several processes this is, as torchrun and accelerate say it in the environment; nothing here imports torch.

Processes that work together also share one file, the first failure: whoever creates it speaks for all, and the others end in
silence. `qwha --gpus` names it; under a torchrun of the user's own it lies in the folder that torchrun made for its workers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwha_cli.errors import UsageError

FAILURE_FILE = "QWHA_FAILURE_FILE"
"""Environment variable: set for the processes that `qwha --gpus` starts."""
_FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
# how long one that lost contact waits for the message of the one that it lost
_PATIENCE_S = 3.0


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: Its number over all machines; 0 writes and speaks.
        size: Processes in all.
        local_rank: Its number on this machine, which is also its GPU's.
        local_size: Processes on this machine.
        failure: Where the first failure is written; None for a process by itself.
        ours: Whether `qwha --gpus` started it, and not somebody's own torchrun.
        shard: Whether the packed base is to be split over the processes: accelerate's word for it is FSDP.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    failure: Path | None = None
    ours: bool = False
    shard: bool = False

    @property
    def first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.rank == 0

    def claim_failure(self, record: Mapping[str, object], *, patient: bool = False) -> bool:
        """Say that this process failed; True if it is the first to say so and should print why.

        Args:
            record: The error as JSON.
            patient: Let others be first for a while: what failed here is only that another process is gone.
        """
        if self.failure is None:
            return True
        end = time.monotonic() + (_PATIENCE_S if patient else 0.0)
        while time.monotonic() < end and not self.failure.exists():
            time.sleep(0.05)
        try:
            with self.failure.open("x", encoding="utf-8") as file:
                file.write(json.dumps(record))
        except FileExistsError:
            return False
        except OSError:
            return True  # better said twice than not at all
        return True


def own_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Read the process's place from the environment; without torchrun's variables it is the only one."""
    env = os.environ if environment is None else environment
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Ranks()
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    ours = FAILURE_FILE in env
    failure = Path(env[FAILURE_FILE]) if ours else None
    if failure is None and "TORCHELASTIC_ERROR_FILE" in env:
        # LOG_DIR/RUN/attempt_0/LOCAL_RANK/error.json: one folder up is shared by the machine's workers
        failure = Path(env["TORCHELASTIC_ERROR_FILE"]).parent.parent / "qwha-failure.json"
    return Ranks(
        rank=rank,
        size=size,
        local_rank=int(env.get("LOCAL_RANK", rank)),
        local_size=int(env.get("LOCAL_WORLD_SIZE", size)),
        failure=failure if size > 1 else None,
        ours=ours,
        shard=_on(env, "ACCELERATE_USE_FSDP"),
    )


def check_launcher(environment: Mapping[str, str] | None = None) -> None:
    """Refuse ways to spread a model that accelerate can be configured for, and that a packed base does not have.

    Raises:
        UsageError: One of them is configured.
    """
    env = os.environ if environment is None else environment
    for variable, name in _FOREIGN.items():
        if _on(env, variable):
            raise UsageError(
                f"accelerate is configured for {name}, which cannot spread a packed base",
                where="accelerate launch",
                remedy="use one of configs/accelerate/: ddp (the base whole on each GPU) or fsdp (its codes split over them)",
            )


def check_split(keep: str, ranks: Ranks) -> None:
    """Refuse, before any stage runs, to keep all dense weights of a base that is to be split over the processes.

    Args:
        keep: The recipe's `train.keep`.
        ranks: The processes.

    Raises:
        UsageError: It is asked for.
    """
    if ranks.shard and ranks.size > 1 and keep == "speed":
        raise UsageError(
            "a base that is split over the GPUs has no dense weights to keep",
            where="train.keep",
            remedy="add train.keep=auto to the command, or do not split: configs/accelerate/ddp.yaml",
        )


def _on(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() in ("1", "true", "yes", "on")
