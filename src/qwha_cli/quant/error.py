"""How far a quantized weight is from the original: in the layer's output, and in the weight itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def layer_error(weight: Tensor, approx: Tensor, gram: Tensor | None) -> float:
    """Energy of the output error over the energy of the output: tr(D G Dᵀ) / tr(W G Wᵀ), D = W − Ŵ.

    Args:
        weight: (out, in), floating.
        approx: (out, in), any floating dtype, same device.
        gram: G = XᵀX (in, in), in the same basis as both; None for the identity.

    Returns:
        0 for an exact copy, 1 for an all-zero approximation; inf if a zero weight is approximated by something else.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    full = weight.to(dtype)
    error, energy = _energy(full - approx.to(dtype), gram), _energy(full, gram)
    if energy > 0:
        return error / energy
    return 0.0 if error == 0 else math.inf


def sqnr_db(weight: Tensor, approx: Tensor) -> float:
    """Signal to quantization noise of a weight, 10 log10(‖W‖² / ‖W − Ŵ‖²), in dB; inf for an exact copy.

    Args:
        weight: (out, in), floating.
        approx: (out, in), floating, same device.
    """
    ratio = layer_error(weight, approx, None)
    return math.inf if ratio == 0 else -10 * math.log10(ratio)


def _energy(matrix: Tensor, gram: Tensor | None) -> float:
    """tr(M G Mᵀ), summed in float64."""
    right = matrix if gram is None else matrix @ gram.to(matrix.dtype)
    return float((right * matrix).sum(dtype=torch.float64))
