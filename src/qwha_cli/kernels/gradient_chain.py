"""Gradients that layers with one input hand to each other, and add to where they lie.

Each layer passes the shared transform on to the next, so in the backward pass each gets what all layers after it want of that
transform. Such a tensor goes to the layer before, or to the transform, and to nobody else, because nobody else has the transform
that it is the gradient of: the layer before may write over it. A mark on the tensor says so. Autograd hands that very tensor on,
adds to it in place where it alone has it, or makes another one, without the mark. Attributes of tensors outlive their way through
autograd; if one day they do not, this costs a copy.
"""

from __future__ import annotations

from torch import Tensor

_OURS = "_qwha_ours"


def mark_ours(gradient: Tensor) -> None:
    """Say of a gradient of a shared transform that nobody but the one it is on its way to can see it."""
    setattr(gradient, _OURS, True)


def is_ours(gradient: Tensor) -> bool:
    """Whether a gradient has that mark and lies in one piece: then it may be written over."""
    return getattr(gradient, _OURS, False) and gradient.is_contiguous()
