"""The transform of a tensor that several layers read: computed by the first, found by the others.

q, k and v, and gate and up, get the same tensor object as input. The result is kept on that object, so that it ends with it and
no cache has to be cleared. It is handed out again only while the tensor holds the same numbers (its version), for the same dtype,
and where its graph is the one that the caller needs; then the gradients of all users meet in one backward transform. A user may
hand it on under another name, with itself in the graph, so that it sees the gradients of those after it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.fp8 import E4M3
from qwha_cli.kernels.stand_in import mark_stand_in, nothing, stands_in, version_of
from qwha_cli.kernels.wht import wht
from qwha_cli.kernels.wht_fp8 import wht_fp8

_ATTRIBUTE = "_qwha_wht"


def shared_wht(x: Tensor, *, dtype: torch.dtype | None = None, backend: Requested = "auto", fp8: bool = False) -> Tensor:
    """The transform as `wht` computes it, one tensor for all callers; do not write into it.

    A leaf that needs a gradient is transformed anew each time: its result's graph would hold the leaf, and the leaf the result.
    Inference tensors have no version; whoever writes into one between two calls gets the first result twice.

    Args:
        x: (..., n), floating, any device.
        dtype: What x is converted to first, under autocast for instance; None for its own.
        backend: Which implementation.
        fp8: Whether the caller reads nothing but the result's 8-bit form (shared_fp8.py).

    Returns:
        (..., n), of that dtype, device of x. For readers of the 8-bit form, it may have no numbers.

    Raises:
        KernelError: As `wht`; or x stands for an input that was never written, and no such transform of it is known.
    """
    dtype = dtype or x.dtype
    recorded = torch.is_grad_enabled() and x.requires_grad
    make = wht_fp8 if fp8 else wht
    if recorded and x.is_leaf:
        return make(x.to(dtype), backend=backend)
    version = version_of(x)
    found = cast("tuple[int, torch.dtype, Tensor] | None", getattr(x, _ATTRIBUTE, None))
    usable = ((version, dtype), (version, E4M3)) if fp8 else ((version, dtype),)
    if found is not None and found[:2] in usable and _serves(found[2], recorded):
        return found[2]
    if stands_in(x):
        raise KernelError("an input that exists as its transform only was read in another form", where="shared_wht")
    result = make(x.to(dtype), backend=backend)
    setattr(x, _ATTRIBUTE, (version, _known_in(result), result))
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


def _known_in(z: Tensor) -> torch.dtype:
    """In which numbers a transform exists."""
    return E4M3 if stands_in(z) else z.dtype


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
    mark_stand_in(x)
    setattr(x, _ATTRIBUTE, (version_of(x), _known_in(z), z))
    return x


class _StandIn(torch.autograd.Function):
    """Wants a gradient where z does, and has none to give."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        return nothing(z.shape, dtype, z.device)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:  # noqa: ANN401
        raise KernelError("an input that exists as its transform only was read by something else", where="shared_wht")
