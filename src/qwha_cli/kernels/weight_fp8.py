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


class WeightScales(NamedTuple):
    """The scales of a weight (out, in) in both forms.

    Attributes:
        rows: (out,) float32, of W.
        whole: () float32, their largest, of Wᵀ.
    """

    rows: Tensor
    whole: Tensor


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


def weight_scales(
    base: Codes | Tensor, values: Tensor, places: Places, *, scale: float, backend: Requested = "auto"
) -> WeightScales:
    """The scales that the bound gives.

    Args:
        base: Q̂ (out, in), quantized, or dense and floating.
        values: (nnz,), floating, same device.
        places: Where they lie.
        scale: s.
        backend: Which implementation; the same to the bit.
    """
    if _in_triton(values, backend):
        from qwha_cli.kernels import weight_fp8_triton

        return WeightScales(*weight_fp8_triton.weight_scales(base, values, places, scale=scale))
    entries = (values.float() * scale).abs()
    counts = places.row_starts.diff().long()
    largest = torch.segment_reduce(entries, "max", lengths=counts, initial=0.0) if len(places) else entries.new_zeros(len(counts))
    rows = scale_of(row_bounds(base) + largest)
    return WeightScales(rows, rows.amax())


def weight_fp8(
    base: Codes | Tensor,
    values: Tensor,
    places: Places,
    scales: WeightScales,
    *,
    scale: float,
    is_turned: bool,
    backend: Requested = "auto",
) -> Fp8Matrix:
    """W (out, in), or Wᵀ (in, out) with one scale for all, every number rounded once.

    Args:
        base: As for `weight_scales`.
        values: Likewise.
        places: Likewise.
        scales: What that gave.
        scale: s.
        is_turned: Which of the two.
        backend: Which implementation; the same to the bit.
    """
    if _in_triton(values, backend):
        from qwha_cli.kernels import weight_fp8_triton

        return Fp8Matrix(*weight_fp8_triton.weight_fp8(base, values, places, scales, scale=scale, is_turned=is_turned))
    dense = build_weight(base, values, places, torch.float32, scale, True, "torch")
    if not is_turned:
        return Fp8Matrix((dense * inverse_of(scales.rows).unsqueeze(1)).to(E4M3), scales.rows)
    turned = (dense * inverse_of(scales.whole)).to(E4M3).view(torch.uint8).T.contiguous().view(E4M3)
    return Fp8Matrix(turned, scales.whole.expand(dense.shape[1]).contiguous())


def both_forms(base: Codes | Tensor, values: Tensor, places: Places, *, scale: float, backend: Requested = "auto") -> Fp8Weight:
    """Both forms, for those who keep them; arguments as for `weight_scales`."""
    scales = weight_scales(base, values, places, scale=scale, backend=backend)
    how = {"scale": scale, "backend": backend}
    forward = weight_fp8(base, values, places, scales, is_turned=False, **how)  # pyright: ignore[reportArgumentType]
    backward = weight_fp8(base, values, places, scales, is_turned=True, **how)  # pyright: ignore[reportArgumentType]
    return Fp8Weight(forward.values, forward.scales, backward.values, backward.scales)


def _in_triton(values: Tensor, backend: Requested) -> bool:
    return choose(backend, op=OP, device=values.device).name == "triton"
