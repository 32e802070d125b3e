"""`--gpus N --nodes M`: the same command again, once for each GPU, by torchrun, and what became of it as one exit code.

torchrun runs inside this process, so that neither its log nor its traceback stands between a person and the one message that
says what happened; the command printed does the same by hand. Ctrl-C and a scheduler's SIGTERM reach every process as SIGINT,
which lets training finish its step and save; a second Ctrl-C ends them at once. Under a torchrun or accelerate of the user's own
nothing is started.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from qwha_cli.errors import Interrupted, QwhaError, RanksError, UsageError
from qwha_cli.stages.ranks import FAILURE_FILE, own_ranks

if TYPE_CHECKING:
    # a quarter of a second, which help need not wait for
    from qwha_cli.recipe.schema import Recipe

# A step and its checkpoint should be done by then; afterwards the processes are killed.
_STOP_S = 600
_PATIENCE = "--shutdown-timeout"


@dataclass(frozen=True)
class Launch:
    """How many processes a command asks for.

    Attributes:
        gpus: GPUs, hence processes, on this machine; None for one process, or for those that are running already.
        nodes: Machines.
        node_rank: This machine's number; None to let them agree on it.
        rendezvous: HOST:PORT of one of the machines, at which all of them meet.
    """

    gpus: int | None = None
    nodes: int = 1
    node_rank: int | None = None
    rendezvous: str | None = None

    @property
    def wanted(self) -> bool:
        """Whether processes are to be started: several are asked for, and none of them is this one."""
        return self.nodes * (self.gpus or 1) > 1 and "RANK" not in os.environ

    def check(self) -> None:
        """Refuse what contradicts itself, or the torchrun that this runs under.

        Raises:
            UsageError: It does.
        """
        if self.nodes == 1 and (self.node_rank is not None or self.rendezvous is not None):
            raise UsageError("--node-rank and --rendezvous belong to several machines", remedy="add --nodes M, or leave them out")
        if self.nodes > 1 and self.rendezvous is None:
            raise UsageError(
                f"{self.nodes} machines need a place to meet",
                where="--rendezvous",
                remedy="add --rendezvous HOST:PORT with the name of one of them, the same on all",
            )
        if self.rendezvous is not None and not self.rendezvous.rpartition(":")[2].isdecimal():
            raise UsageError(f"{self.rendezvous} is not HOST:PORT", where="--rendezvous", remedy="for example node1:29500")
        if self.node_rank is not None and self.node_rank >= self.nodes:
            raise UsageError(f"there is no machine {self.node_rank} of {self.nodes}", where="--node-rank", remedy="count from 0")
        if self.nodes > 1 and self.gpus is None:
            raise UsageError("--nodes needs --gpus", where="--gpus", remedy="say how many GPUs each machine has: --gpus N")
        ranks = own_ranks()
        if "RANK" not in os.environ:
            return
        nodes = max(1, ranks.size // ranks.local_size)
        if self.gpus not in (None, ranks.local_size) or (self.gpus is not None and self.nodes != nodes):
            raise UsageError(
                f"--gpus {self.gpus} --nodes {self.nodes} under a launcher that started {ranks.local_size} processes on each of "
                f"{nodes} machines",
                where="--gpus",
                remedy="leave the option out: torchrun and accelerate launch say how many there are",
            )

    def arguments(self, command: Sequence[str], *, name: str) -> list[str]:
        """What torchrun is called with.

        Args:
            command: `qwha`'s own words, from the command's name on.
            name: Of the run, by which machines know that they belong together.
        """
        found = ["--nnodes", str(self.nodes), "--nproc-per-node", str(self.gpus or 1)]
        if self.rendezvous is None:
            found += ["--standalone"]
        elif self.node_rank is None:
            found += ["--rdzv-backend", "c10d", "--rdzv-endpoint", self.rendezvous, "--rdzv-id", name]
        else:
            host, _, port = self.rendezvous.rpartition(":")
            found += ["--node-rank", str(self.node_rank), "--master-addr", host, "--master-port", port]
        return [*found, "-m", "qwha_cli", *command]


def check_recipe(launch: Launch, recipe: Recipe) -> None:
    """Refuse, before anything starts, what every process would refuse after it.

    Raises:
        UsageError: The batch does not divide, or this machine has too few GPUs, or the recipe names a single one.
    """
    import torch

    from qwha_cli.stages.device import check_gpus, check_several
    from qwha_cli.training.batches import check_split

    ranks = (launch.gpus or 1) * launch.nodes
    check_split(recipe.train.batch_size, ranks=ranks)
    if recipe.model.device != "cpu":
        check_several(recipe.model.device, ranks=ranks)
        check_gpus(launch.gpus or 1, there=torch.cuda.device_count())


def start(launch: Launch, command: Sequence[str], *, recipe: Recipe, say: Callable[[str], None], debug: bool) -> int:
    """Run a command on every GPU and wait for it.

    Args:
        launch: How many.
        command: `qwha`'s words for each process.
        recipe: What they will run.
        say: Prints a line.
        debug: Leave torchrun's log on.

    Returns:
        The exit code: that of the process that failed first, which has said why.

    Raises:
        UsageError: See `check_recipe`.
        RanksError: A process ended without a word.
        Interrupted: The user stopped while no process had begun.
    """
    check_recipe(launch, recipe)
    arguments = launch.arguments(command, name=recipe.name)
    if recipe.model.device == "cpu":
        say(f"launch   {launch.gpus} processes on the CPU, since the recipe's model.device is cpu")
    say(f"launch   {shlex.join([sys.executable, '-m', 'torch.distributed.run', *arguments])}")
    with tempfile.TemporaryDirectory(prefix="qwha-launch-") as folder:
        failure = Path(folder) / "failure.json"
        os.environ[FAILURE_FILE] = str(failure)
        # torchrun would say 1, and the first process has the work of quantize to do
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (launch.gpus or 1))))
        if not debug:
            logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        silent = _torchrun(arguments)
        if failure.exists():
            return int(json.loads(failure.read_text(encoding="utf-8"))["exit_code"])
    if silent is not None:
        raise silent
    return 0


def _torchrun(arguments: Sequence[str]) -> QwhaError | None:
    """Let torchrun work; return what to say if no process has said anything."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, parse_args, run

    def stop(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, stop)
    try:
        run(parse_args([*stopping(get_args_parser()), *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"by {failure.signal_name()}" if failure.exitcode < 0 else f"with exit code {failure.exitcode}"
        return RanksError(
            f"process {rank} ended {how}, without a message of its own",
            where="launch",
            remedy="a kill by SIGKILL is often memory that ran out; checkpoints are kept, and the same command continues",
        )
    except (SignalException, KeyboardInterrupt):
        _end_children()
        return Interrupted("stopped", remedy="finished stages and the last checkpoint are kept; the same command continues")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return None


def stopping(parser: argparse.ArgumentParser) -> list[str]:
    """What tells torchrun how to stop its processes, of what a torchrun with this parser understands.

    That of torch 2.11 cannot be told how long they may take after a SIGINT: it kills them after 30 seconds.
    """
    found = ["--signals-to-handle", "SIGINT"]
    return [*found, _PATIENCE, str(_STOP_S)] if _PATIENCE in parser.format_help() else found


def _end_children() -> None:
    """End the processes that are still there after a second Ctrl-C; without /proc they are left to torchrun."""
    with contextlib.suppress(OSError, ValueError):
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split():
            os.kill(int(child), signal.SIGKILL)
