"""The three products of a layer whose operands are 8-bit numbers, and what layers with one input share of them.

    y = z Wᵀ + b        dz = dy W        dF / s = dyᵀ z        z = x H

In the Hadamard domain z has no outliers and W no large rows, and three bits behind the point lose about as much of a product as
they do of Gaussian numbers: 3.7 % of a sum's size for both operands, independently for each. The values of F and their optimizer
stay float32. Products sum over their rows' dimension, so dz needs Wᵀ and dF needs dyᵀ and zᵀ, where a token's scale in
z is moved to its dy. Of layers with one input the first that is differentiated makes zᵀ, and the others find it on the gradient
that they get from there.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.fp8 import MULTIPLE, Fp8Matrix, both_ways, matmul_fp8, to_fp8, turned
from qwha_cli.kernels.gradient_chain import in_parts, is_ours, parts_of

_TURNED = "_qwha_fp8_turned"


def fits_fp8(shape: tuple[int, int]) -> bool:
    """Whether tensor cores take the sizes of a weight (out, in) in 8-bit products."""
    return not (shape[0] % MULTIPLE or shape[1] % MULTIPLE)


def suits_fp8(x: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the products of x (..., in) and a weight (out, in) are of 8-bit numbers, where that is wanted.

    Of sizes that tensor cores take, and on a GPU in bfloat16. How many tokens there are does not matter, so that neither padding
    nor the number of processes changes the arithmetic.
    """
    if not fits_fp8(shape) or not x.numel():
        return False
    return dtype == torch.bfloat16 or (dtype == torch.float32 and x.device.type != "cuda")


def fp8_product(z: Fp8Matrix, weight: Fp8Matrix, bias: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """Y = z Wᵀ + b (tokens, out), of dtype."""
    y = matmul_fp8(z, weight, dtype)
    return y if bias is None else y.add_(bias)


def fp8_gradients(
    dy: Tensor,
    passed: Tensor | None,
    z: Fp8Matrix,
    turned_weight: Fp8Matrix | None,
    *,
    dtype: torch.dtype,
    wanted: bool,
    apart: bool = False,
    backend: Requested,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z and of the matrix that F is in.

    Args:
        dy: (..., out).
        passed: (..., in), what later layers have found for the same z, written over if it is ours alone; None for nothing.
        z: (tokens, in), as in the forward pass.
        turned_weight: Wᵀ (in, out); None if no gradient of z is wanted.
        dtype: Of the results.
        wanted: Whether the second is.
        apart: Whether dz and what was passed are handed on in parts, see gradient_chain.py.
        backend: Which implementation rounds and transposes.

    Returns:
        dz (..., in) with what was passed added, or None; dF / s (out, in), or None.
    """
    flat = dy.reshape(-1, dy.shape[-1])
    dz = spectrum = columns = None
    if wanted:
        # a token counts by both: its scale in z goes to its dy
        rows, columns = both_ways(flat, by=z.scales, backend=backend)
    else:
        rows = to_fp8(flat, backend=backend)
    if turned_weight is not None:
        dz = matmul_fp8(rows, turned_weight, dtype).view(*dy.shape[:-1], -1)
        if passed is not None:
            dz = in_parts((*parts_of(passed), dz)) if apart else _sum(passed, dz)
    if columns is not None:
        other = cast("Fp8Matrix | None", getattr(passed, _TURNED, None)) or turned(z, backend=backend)
        spectrum = matmul_fp8(columns, other, dtype)
        if dz is not None:
            setattr(dz, _TURNED, other)
    return dz, spectrum


def _sum(passed: Tensor, dz: Tensor) -> Tensor:
    return passed.add_(dz) if is_ours(passed) else passed + dz
