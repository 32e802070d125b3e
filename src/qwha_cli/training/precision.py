"""Which arithmetic the forward and backward passes use; the trained values and the optimizer stay in fp32 in every case.

`auto` takes bf16 autocast where the hardware is fast at it: CUDA from compute capability 8.0 on, CPUs with AMX. Elsewhere bf16 is
emulated, or, on CPUs with AVX512-BF16 alone, native and still slower than fp32 (measured: 5.5 s against 4.3 s a step). fp16 is
not offered: it needs loss scaling, whose state would have to be part of the exact resume, and every device with fast fp16
training in reach also has bf16. fp8 is bf16 with the large products of adapted layers in 8 bits, see kernels/fp8_products.py;
its scales come from the numbers themselves, so that it has no state either. It is never chosen by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch

from qwha_cli.errors import UsageError
from qwha_cli.kernels.fp8 import lacks_fp8

Precision = Literal["auto", "bf16", "fp8", "fp32"]


@dataclass(frozen=True)
class PrecisionChoice:
    """What was chosen, and why.

    Attributes:
        autocast: The dtype of matrix products, or None for the model's own dtype.
        reason: One sentence for the run's notes.
        fp8: Whether adapted layers multiply 8-bit numbers.
    """

    autocast: torch.dtype | None
    reason: str
    fp8: bool = False

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return "fp8" if self.fp8 else "fp32" if self.autocast is None else "bf16"


def choose_precision(requested: Precision, *, device: torch.device) -> PrecisionChoice:
    """Decide between bf16 autocast and plain arithmetic.

    Args:
        requested: What the recipe says.
        device: Where the model will run.

    Returns:
        The choice and its reason; all but `auto` are taken at their word.

    Raises:
        UsageError: `fp8`, and a GPU that does not have it.
    """
    if requested == "fp8":
        lacking = lacks_fp8(device)
        if lacking is not None:
            raise UsageError(lacking, where="train.precision", remedy="use bf16")
        slowly = "" if device.type == "cuda" else f"; {device.type} multiplies the 8-bit numbers as float32"
        reason = f"precision fp8 (bf16 autocast, 8-bit products in adapted layers), as the recipe asks{slowly}"
        return PrecisionChoice(torch.bfloat16, reason, fp8=True)
    if requested == "fp32":
        return PrecisionChoice(None, "precision fp32, as the recipe asks")
    if requested == "bf16":
        return PrecisionChoice(torch.bfloat16, "precision bf16 (autocast), as the recipe asks")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return PrecisionChoice(torch.bfloat16, f"precision bf16 (autocast): {name} has it natively")
        return PrecisionChoice(None, f"precision fp32: {name} only emulates bf16")
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return PrecisionChoice(torch.bfloat16, "precision bf16 (autocast): this CPU has bf16 matrix instructions")
    return PrecisionChoice(None, f"precision fp32: no native bf16 matrix instructions found on this {device.type}")


@contextlib.contextmanager
def autocasting(dtype: torch.dtype | None, *, device: torch.device) -> Generator[None]:
    """Run the block under autocast to `dtype`, or plainly when it is None."""
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "bf16"))
