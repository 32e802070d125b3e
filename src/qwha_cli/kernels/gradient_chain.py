"""Gradients that layers with one input hand to each other, and add to where they lie, or leave to be added by who reads them.

Each layer passes the shared transform on to the next, so in the backward pass each gets what all layers after it want of that
transform. Such a tensor goes to the layer before, or to the transform, and to nobody else, because nobody else has the transform
that it is the gradient of: the layer before may write over it. A mark on the tensor says so. Autograd hands that very tensor on,
adds to it in place where it alone has it, or makes another one, without the mark. Attributes of tensors outlive their way through
autograd; if one day they do not, this costs a copy.

A product of 8-bit numbers cannot add to what is there. Where the transform's own backward pass reads several gradients in one
pass, which a mark on the transform says, each layer hands on all of them, and a tensor without numbers in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.stand_in import mark_stand_in, nothing, stands_in

_OURS, _PARTS, _TAKES_PARTS = "_qwha_ours", "_qwha_parts", "_qwha_takes_parts"


def mark_ours(gradient: Tensor) -> None:
    """Say of a gradient of a shared transform that nobody but the one it is on its way to can see it."""
    setattr(gradient, _OURS, True)


def is_ours(gradient: Tensor) -> bool:
    """Whether a gradient has that mark and lies in one piece: then it may be written over."""
    return getattr(gradient, _OURS, False) and gradient.is_contiguous()


def mark_takes_parts(z: Tensor) -> None:
    """Say of a transform, under any name, that its gradient may come in parts."""
    setattr(z, _TAKES_PARTS, True)


def takes_parts(z: Tensor) -> bool:
    """Whether that was said of this very object."""
    return getattr(z, _TAKES_PARTS, False)


def in_parts(parts: Sequence[Tensor]) -> Tensor:
    """A tensor without numbers that stands for the sum of gradients of one shape and dtype."""
    total = nothing(parts[0].shape, parts[0].dtype, parts[0].device)
    mark_stand_in(total)
    setattr(total, _PARTS, tuple(parts))
    return total


def parts_of(gradient: Tensor) -> tuple[Tensor, ...]:
    """What a gradient is the sum of; it alone, if it has numbers.

    Raises:
        KernelError: It has neither numbers nor parts.
    """
    found: tuple[Tensor, ...] | None = getattr(gradient, _PARTS, None)
    if found is None and stands_in(gradient):
        raise KernelError("a gradient without numbers was read after its parts were gone", where="gradient_chain")
    return found or (gradient,)
