"""The transform of a tensor that several layers read: computed by the first, found by the others.

q, k and v, and gate and up, get the same tensor object as input. The result is kept on that object, so that it ends with it and
no cache has to be cleared. It is handed out again only while the tensor holds the same numbers (its version), for the same dtype,
and where its graph is the one that the caller needs; then the gradients of all users meet in one backward transform. A user may
hand it on under another name, with itself in the graph, so that it sees the gradients of those after it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

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
    version = -1 if x.is_inference() else x._version
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


def _serves(result: Tensor, recorded: bool) -> bool:
    """Whether a result made earlier fits what the caller records."""
    # autograd keeps no tensors that were made under inference_mode
    return result.requires_grad == recorded and (not result.is_inference() or torch.is_inference_mode_enabled())
