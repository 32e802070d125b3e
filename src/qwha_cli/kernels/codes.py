"""A quantized matrix as kernels see it: its tensors, and the numbers that are needed to read them.

Two layouts (quant/layout.py says how they come about):

    gptq    value = scale · (code − zero / 2^(zero_bits − bits))
            codes   int32 (ceil(in · bits / 32), out)             packed along the inputs, see unpack.py
            scales  float16 (in / group_size, out)
            zeros   int32 (in / group_size, ceil(out · zero_bits / 32))   packed along the outputs
    nf4     value = table[code] · scale, blocks of group_size in the flattened (out, in) matrix
            codes   uint8 (ceil(out · in / 2), 1)                 two a byte, the first in the high half
            scales  float32 (out · in / group_size,)
            zeros   float32 (16,), the table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["gptq", "nf4"]


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantized (out, in) matrix in its own basis.

    Attributes:
        codes: As above; contiguous and on one device, like all tensors.
        scales: As above.
        zeros: As above.
        layout: Which of the two.
        shape: (out, in).
        bits: Bits a code.
        zero_bits: Bits a zero point, at least bits; nf4 has none.
        group_size: Neighbouring weights that share a scale; divides `in`, and is even in the layout nf4.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    layout: Layout
    shape: tuple[int, int]
    bits: int
    zero_bits: int
    group_size: int

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.codes.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales and zeros."""
        return self.codes, self.scales, self.zeros


def taken_apart(base: Codes | Tensor) -> tuple[tuple[Tensor, ...], Codes | None]:
    """A base as tensors that autograd can save, and what else is to be known to put it together again.

    Kept on a function's context instead, the tensors of a base that is gathered from several processes would stay from a block's
    first forward pass to its backward pass, although checkpointing has them gathered anew.
    """
    if isinstance(base, Tensor):
        return (base,), None
    nothing = torch.empty(0)
    return base.tensors, replace(base, codes=nothing, scales=nothing, zeros=nothing)


def put_together(tensors: Sequence[Tensor], form: Codes | None) -> Codes | Tensor:
    """Undo `taken_apart`."""
    if form is None:
        (base,) = tensors
        return base
    codes, scales, zeros = tensors
    return replace(form, codes=codes, scales=scales, zeros=zeros)
