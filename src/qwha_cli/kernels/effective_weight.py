"""The dense weight that base and sparse adapter make together, in the base's own basis.

basis "hadamard": W = Q̂ + s F.  basis "weight": W = Q̂ + s F Hᵀ (paper §3.1: ΔW = F H⁻¹). With the identity transform the second is
W = Q̂ + s F as well. F is given by its values and their places in the flattened (out, in) matrix; places that repeat add up, so
several adapters on one layer are one call.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qwha_cli.kernels.wht import wht

Basis = Literal["weight", "hadamard"]
Transform = Literal["wht", "identity"]


def effective_weight(
    base: Tensor, values: Tensor, flat_index: Tensor, *, basis: Basis, scale: float, transform: Transform = "wht"
) -> Tensor:
    """Base plus adapter; differentiable in `values` and in `base`.

    Args:
        base: (out, in), floating; not written into.
        values: (nnz,), floating, same device.
        flat_index: (nnz,) int32 or int64, row · in + column; repeats add up.
        basis: Where the base's codes live.
        scale: Factor of the adapter.
        transform: `identity` leaves out H in the weight basis; the Hadamard basis has none to leave out on this side.

    Returns:
        (out, in), dtype of base.
    """
    scaled = (values * scale).to(base.dtype)
    if basis == "hadamard" or transform == "identity":
        return base.reshape(-1).index_add(0, flat_index, scaled).reshape(base.shape)
    spectrum = torch.zeros(base.numel(), dtype=base.dtype, device=base.device).index_add(0, flat_index, scaled)
    return base + wht(spectrum.reshape(base.shape), transpose=True)
