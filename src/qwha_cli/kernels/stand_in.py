"""Tensors that stand for numbers which exist in another form only, and how often a tensor was written to.

Autograd, and the modules of an architecture, hand tensors on. Where all readers of one want another form of its numbers, which is
noted on the tensor object, the numbers themselves need not exist: the tensor has one number, not a number, at every place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_MARK = "_qwha_stands_in"


def nothing(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of that shape, which takes no memory and must not be written to; under inference mode, one of inference."""
    if torch.is_inference_mode_enabled():
        return torch.full((), math.nan, dtype=dtype, device=device).expand(*shape)
    return _nothing(dtype, device).expand(*shape)


def mark_stand_in(tensor: Tensor) -> None:
    """Say of a tensor that its numbers exist in another form only."""
    setattr(tensor, _MARK, True)


def stands_in(tensor: Tensor) -> bool:
    """Whether that was said of this very object."""
    return getattr(tensor, _MARK, False)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; always the same for inference tensors, which count no versions."""
    return -1 if tensor.is_inference() else tensor._version


@lru_cache(maxsize=16)
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), math.nan, dtype=dtype, device=device)
