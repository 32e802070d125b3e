"""The effective weight of the Hadamard basis as 8-bit numbers, straight from codes and entries, in either form that passes read.

    W = Q̂ + s F      row i as s_i W₈,  max_j |W_ij| ≤ β_i = max_j |q̂_j| + max_j |s F_ij| ≤ 448 s_i      Wᵀ with max_i s_i for all

q̂_j runs over the numbers that a row's codes could be, so a row's bound β follows from its scales, zeros and entries, half of its
bytes, and every number is rounded once, where it is made: no dense weight is written, and none is read to be turned. Codes use
all of their range, so the bound is hardly looser than the largest entry. Sums are in float32, as those of effective_weight.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qwha_cli.kernels.backend import Requested, choose
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import row_bounds
from qwha_cli.kernels.effective_weight import build_weight
from qwha_cli.kernels.fp8 import E4M3, Fp8Matrix, inverse_of, scale_of
from qwha_cli.kernels.places import Places

OP = "effective_weight"


class Fp8Weight(NamedTuple):
    """A weight in both forms that the passes read, as tensors, for those who keep it.

    Attributes:
        values: W (out, in), e4m3.
        scales: Its rows' (out,).
        turned: Wᵀ (in, out), e4m3.
        turned_scales: Its rows' (in,).
    """

    values: Tensor
    scales: Tensor
    turned: Tensor
    turned_scales: Tensor


def weight_fp8(
    base: Codes | Tensor, values: Tensor, places: Places, *, scale: float, backend: Requested = "auto"
) -> tuple[Fp8Matrix, Tensor]:
    """W for the forward pass, every number rounded once, with the scales that the bound gives.

    Args:
        base: Q̂ (out, in), quantized, or dense and floating.
        values: (nnz,), floating, same device.
        places: Where they lie.
        scale: s.
        backend: Which implementation; the same to the bit.

    Returns:
        W (out, in), and some float32 numbers (k,) the largest of which is the largest scale: what `turned_fp8` asks for.
    """
    if _in_triton(values, backend):
        from qwha_cli.kernels import weight_fp8_triton

        numbers, rows, most = weight_fp8_triton.weight_fp8(base, values, places, scale=scale)
        return Fp8Matrix(numbers, rows), most
    entries = (values.float() * scale).abs()
    counts = places.row_starts.diff().long()
    largest = torch.segment_reduce(entries, "max", lengths=counts, initial=0.0) if len(places) else entries.new_zeros(len(counts))
    rows = scale_of(row_bounds(base) + largest)
    dense = build_weight(base, values, places, torch.float32, scale, True, "torch")
    return Fp8Matrix((dense * inverse_of(rows).unsqueeze(1)).to(E4M3), rows), rows.amax(dim=0, keepdim=True)


def turned_fp8(
    base: Codes | Tensor, values: Tensor, places: Places, most: Tensor, *, scale: float, backend: Requested = "auto"
) -> Fp8Matrix:
    """Wᵀ (in, out) for the backward pass, with one scale for all, every number rounded once; arguments as `weight_fp8`'s."""
    if _in_triton(values, backend):
        from qwha_cli.kernels import weight_fp8_triton

        return Fp8Matrix(*weight_fp8_triton.turned_fp8(base, values, places, most, scale=scale))
    whole = most.amax()
    dense = build_weight(base, values, places, torch.float32, scale, True, "torch")
    turned = (dense * inverse_of(whole)).to(E4M3).view(torch.uint8).T.contiguous().view(E4M3)
    return Fp8Matrix(turned, whole.expand(dense.shape[1]).contiguous())


def both_forms(base: Codes | Tensor, values: Tensor, places: Places, *, scale: float, backend: Requested = "auto") -> Fp8Weight:
    """Both forms, for those who keep them; arguments as `weight_fp8`'s."""
    forward, most = weight_fp8(base, values, places, scale=scale, backend=backend)
    backward = turned_fp8(base, values, places, most, scale=scale, backend=backend)
    return Fp8Weight(forward.values, forward.scales, backward.values, backward.scales)


def _in_triton(values: Tensor, backend: Requested) -> bool:
    return choose(backend, op=OP, device=values.device).name == "triton"
