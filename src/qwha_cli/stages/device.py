"""Which devices and number format a stage computes in."""

from __future__ import annotations

import torch

from qwha_cli.errors import UsageError
from qwha_cli.stages.ranks import Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(setting: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device.

    Raises:
        UsageError: A CUDA device is asked for that is not there.
    """
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(setting)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(
            f"device {setting} is not there ({count} CUDA devices found)",
            where="model.device",
            remedy="use `model.device=cpu` or `auto`; `qwha doctor` shows what is here",
        )
    return device


def device_of_rank(setting: str, ranks: Ranks) -> torch.device:
    """Turn a recipe's device into that of one of several processes: on GPUs each has its own.

    Raises:
        UsageError: The device is not there, or one GPU is named for several processes.
    """
    device = resolve_device(setting)
    if ranks.size == 1 or device.type != "cuda":
        return device
    check_several(setting, ranks=ranks.size)
    device = resolve_device(f"cuda:{ranks.local_rank}")
    torch.cuda.set_device(device)
    return device


def devices_of_stage(device: torch.device, *, gpus: int | None, ranks: Ranks) -> tuple[torch.device, ...]:
    """The devices that a stage of one process may share its work out to, its own first.

    Args:
        device: The process's own.
        gpus: How many GPUs were asked for; None for as many as processes were started on this machine, since all but the first
            wait for it.
        ranks: The processes.

    Raises:
        UsageError: More GPUs are asked for than there are.
    """
    count = ranks.local_size if gpus is None or ranks.size > 1 else gpus
    if count == 1 or (device.type != "cuda" and gpus is None):
        return (device,)
    if device.type != "cuda" and torch.cuda.is_available():
        raise UsageError(f"{count} GPUs asked for, and model.device={device}", where="--gpus", remedy="leave one of them out")
    there = torch.cuda.device_count()
    check_gpus(count, there=there)
    first = device.index or 0
    others = [index for index in range(there) if index != first]
    return (device, *(torch.device("cuda", index) for index in others[: count - 1]))


def check_several(setting: str, *, ranks: int) -> None:
    """Refuse a recipe that names one GPU for several processes.

    Raises:
        UsageError: It does.
    """
    if setting.startswith("cuda:"):
        raise UsageError(
            f"{setting} is one GPU, but there are {ranks} processes",
            where="model.device",
            remedy="set model.device=cuda, so that each process takes its own, and choose GPUs with CUDA_VISIBLE_DEVICES",
        )


def check_gpus(count: int, *, there: int) -> None:
    """Refuse to start with more GPUs than the machine has.

    Raises:
        UsageError: There are fewer.
    """
    if count > there:
        raise UsageError(
            f"{count} GPUs asked for, {there} found",
            where="--gpus",
            remedy="ask for fewer (`qwha doctor` shows what is here), or try it on the CPU with `--device cpu`",
        )


def resolve_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Turn a recipe's dtype into torch's; `auto` is bfloat16 on CUDA and float32 on a CPU, where half formats are slow."""
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[setting]
