"""Which device and number format a stage computes in."""

from __future__ import annotations

import torch

from qwha_cli.errors import UsageError

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


def resolve_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Turn a recipe's dtype into torch's; `auto` is bfloat16 on CUDA and float32 on a CPU, where half formats are slow."""
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[setting]
