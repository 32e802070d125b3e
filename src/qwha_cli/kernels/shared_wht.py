"""The transform of a tensor that several layers read: computed by the first, found by the others.

q, k and v, and gate and up, get the same tensor object as input. The result is kept on that object, so that it ends with it and
no cache has to be cleared. It is handed out again only while the tensor holds the same numbers (its version), for the same dtype,
and where its graph is the one that the caller needs; then the gradients of all users meet in one backward transform. A user may
hand it on under another name, with itself in the graph, so that it sees the gradients of those after it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.wht import wht

_ATTRIBUTE = "_qwha_wht"


def shared_wht(x: Tensor, *, dtype: torch.dtype | None = None, backend: Requested = "auto") -> Tensor:
    """The transform as `wht` computes it, one tensor for all callers; do not write into it.

    A leaf that needs a gradient is transformed anew each time: its result's graph would hold the leaf, and the leaf the result.
    Inference tensors have no version; whoever writes into one between two calls gets the first result twice.

    Args:
        x: (..., n), floating, any device.
        dtype: What x is converted to first, under autocast for instance; None for its own.
        backend: Which implementation.

    Returns:
        (..., n), of that dtype, device of x.

    Raises:
        KernelError: As `wht`.
    """
    dtype = dtype or x.dtype
    recorded = torch.is_grad_enabled() and x.requires_grad
    if recorded and x.is_leaf:
        return wht(x.to(dtype), backend=backend)
    version = version_of(x)
    found = cast("tuple[int, torch.dtype, Tensor] | None", getattr(x, _ATTRIBUTE, None))
    if found is not None and found[:2] == (version, dtype) and _serves(found[2], recorded):
        return found[2]
    result = wht(x.to(dtype), backend=backend)
    setattr(x, _ATTRIBUTE, (version, dtype, result))
    return result


def hand_on(x: Tensor, result: Tensor, passed: Tensor) -> None:
    """Let those who ask for the transform of `x` after this call have `passed`, the same numbers as `result`, instead of it.

    Args:
        x: (..., n), of which `shared_wht` gave `result`. If that is not what x keeps, nothing happens.
        result: What it gave.
        passed: Those numbers, with a graph that leads through who was given `result`.
    """
    found = cast("tuple[int, torch.dtype, Tensor] | None", getattr(x, _ATTRIBUTE, None))
    if found is not None and found[2] is result:
        setattr(x, _ATTRIBUTE, (*found[:2], passed))


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; always the same for inference tensors, which count no versions."""
    return -1 if tensor.is_inference() else tensor._version


def _serves(result: Tensor, recorded: bool) -> bool:
    """Whether a result made earlier fits what the caller records."""
    # autograd keeps no tensors that were made under inference_mode
    return result.requires_grad == recorded and (not result.is_inference() or torch.is_inference_mode_enabled())


def stand_in(z: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor whose shared transform is z, for an input that was never written to memory.

    It has one number, not a number, at every place, and cannot be read for anything else: gradients to it are refused.

    Args:
        z: (..., n), floating.
        dtype: Of the input that the result stands for.

    Returns:
        (..., n) of `dtype`; `shared_wht` gives z for it, for z's dtype.
    """
    x: Tensor = _StandIn.apply(z, dtype)
    setattr(x, _ATTRIBUTE, (version_of(x), z.dtype, z))
    return x


class _StandIn(torch.autograd.Function):
    """Wants a gradient where z does, and has none to give."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        return _nothing(dtype, z.device).expand(z.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:  # noqa: ANN401
        raise KernelError("an input that exists as its transform only was read by something else", where="shared_wht")


@lru_cache(maxsize=16)
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), math.nan, dtype=dtype, device=device)
