"""Which implementation of an op runs, and why.

Every op has a form in plain torch operations, right on every device. A faster one in Triton is a file `X_triton.py` beside
`X.py`, listed in `_TRITON`. The choice is returned together with its reason so that a stage can record both: a fallback is never
silent.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from qwha_cli.errors import KernelError

Backend = Literal["torch", "triton"]
Requested = Literal["auto", "torch", "triton"]

# from here on cards have the instructions that kernels use: products of bfloat16 between registers, two numbers rounded at once
_FIRST_CAPABILITY = (8, 0)
# ops that have a Triton form
_TRITON = frozenset({"column_sweep", "dequantize", "effective_weight", "fp8", "fused_wht", "quant_matmul", "row_solve", "wht"})


@dataclass(frozen=True)
class Choice:
    """The backend an op runs on and the reason, for the manifest."""

    name: Backend
    reason: str


def choose(requested: Requested, *, op: str, device: torch.device, lacking: Callable[[], str | None] = lambda: None) -> Choice:
    """Choose the backend of one op.

    Args:
        requested: What the user asked for; `auto` takes the fastest that exists for this device.
        op: The op's name, as its file is called.
        device: Where its tensors lie.
        lacking: What the kernel does not take of this call, in words; None for nothing. Asked where it would run otherwise.

    Raises:
        KernelError: `triton` was asked for and this op has no Triton form, or this machine cannot run it, or not this call.
    """
    choice = _choose(requested, op, device.type, device.index, interpreted())
    reason = lacking() if choice.name == "triton" else None
    return choice if reason is None else _without_triton(requested, op, reason)


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on a CPU and for tests: it knows no instructions of a card."""
    # read anew each time, because tests set it
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=256)
def _choose(requested: Requested, op: str, device_type: str, index: int | None, by_interpreter: bool) -> Choice:
    if requested == "torch":
        return Choice("torch", "asked for")
    lacking = _lacking(op, device_type, index, by_interpreter)
    if lacking is None:
        return Choice("triton", "asked for" if requested == "triton" else "the fastest that exists")
    return _without_triton(requested, op, lacking)


def _without_triton(requested: Requested, op: str, lacking: str) -> Choice:
    if requested == "triton":
        raise KernelError(f"the Triton kernel cannot run: {lacking}", where=op, remedy="use backend auto or torch")
    return Choice("torch", lacking)


def _lacking(op: str, device_type: str, index: int | None, by_interpreter: bool) -> str | None:
    """What stands between this op and its Triton kernel; None for nothing."""
    if op not in _TRITON:
        return "there is no Triton kernel for this op yet"
    if not _has_triton():
        return "triton is not installed"
    # Triton's interpreter runs kernels on CPU tensors, for tests
    if device_type != "cuda" and not by_interpreter:
        return f"Triton kernels run on CUDA devices, not on {device_type}"
    return None if by_interpreter else _lacking_card(index)


@lru_cache(maxsize=64)
def _lacking_card(index: int | None) -> str | None:
    """What a card, the current one for None, lacks for the instructions of NVIDIA's that kernels have; None for nothing."""
    if torch.version.hip is not None:
        return "the Triton kernels have instructions of NVIDIA's cards"
    if not torch.cuda.device_count():
        return None
    card = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if (card.major, card.minor) < _FIRST_CAPABILITY:
        return f"the Triton kernels need compute capability 8.0, and {card.name} has {card.major}.{card.minor}"
    return None


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
