"""The three products of a layer whose operands are 8-bit numbers, and what layers with one input share of them.

    y = z Wᵀ + b        dz = dy W        dF / s = dyᵀ z        z = x H

In the Hadamard domain z has no outliers and W no large rows, and three bits behind the point lose about as much of a product as
they do of Gaussian numbers: 3.7 % of a sum's size for both operands, independently for each. The values of F and their optimizer
stay float32. Products sum over their rows' dimension, so dz needs Wᵀ and dF needs dyᵀ and zᵀ, where a token's scale in
z is moved to its dy. Of layers with one input the first that is differentiated makes zᵀ, and the others find it on the gradient
that they get from there.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.fp8 import MULTIPLE, Fp8Matrix, matmul_fp8, to_fp8, transposed, turned
from qwha_cli.kernels.gradient_chain import is_ours
from qwha_cli.kernels.shared_wht import version_of

_FORM, _TURNED = "_qwha_fp8", "_qwha_fp8_turned"


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


def fp8_weight(weight: Tensor, *, backend: Requested) -> Fp8Weight:
    """A dense weight (out, in) in both forms."""
    forward = to_fp8(weight, backend=backend)
    backward = transposed(forward, backend=backend)
    return Fp8Weight(forward.values, forward.scales, backward.values, backward.scales)


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


def shared_fp8(z: Tensor, *, backend: Requested) -> Fp8Matrix:
    """The 8-bit form of z (..., in) as a matrix (tokens, in), made once for all that ask for it before z is written to."""
    version = version_of(z)
    found = cast("tuple[int, Fp8Matrix] | None", getattr(z, _FORM, None))
    if found is not None and found[0] == version:
        return found[1]
    form = to_fp8(z.detach().reshape(-1, z.shape[-1]), backend=backend)
    setattr(z, _FORM, (version, form))
    return form


def hand_on_fp8(form: Fp8Matrix, passed: Tensor) -> None:
    """Let `passed`, the numbers that `form` was made of under another name, be known in that form too."""
    setattr(passed, _FORM, (version_of(passed), form))


def fp8_product(z: Fp8Matrix, weight: Fp8Matrix, bias: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """Y = z Wᵀ + b (tokens, out), of dtype."""
    y = matmul_fp8(z, weight, dtype, exact_sums=False)
    return y if bias is None else y.add_(bias)


def fp8_gradients(
    dy: Tensor,
    passed: Tensor | None,
    z: Fp8Matrix,
    weight: Fp8Matrix | None,
    *,
    is_turned: bool = False,
    dtype: torch.dtype,
    wanted: bool,
    backend: Requested,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z and of the matrix that F is in.

    Args:
        dy: (..., out).
        passed: (..., in), what later layers have found for the same z, written over if it is ours alone; None for nothing.
        z: (tokens, in), as in the forward pass.
        weight: (out, in), likewise, or its transpose; None if no gradient of z is wanted.
        is_turned: Whether it is the transpose.
        dtype: Of the results.
        wanted: Whether the second is.
        backend: Which implementation rounds and transposes.

    Returns:
        dz (..., in) with what was passed added, or None; dF / s (out, in), or None.
    """
    rows = to_fp8(dy.reshape(-1, dy.shape[-1]), backend=backend)
    dz = spectrum = None
    if weight is not None:
        weight = weight if is_turned else transposed(weight, backend=backend)
        dz = matmul_fp8(rows, weight, dtype).view(*dy.shape[:-1], -1)
    if dz is not None and passed is not None:
        dz = passed.add_(dz) if is_ours(passed) else passed + dz
    if wanted:
        # a token counts by both: its scale in z goes to its dy
        other = cast("Fp8Matrix | None", getattr(passed, _TURNED, None)) or turned(z, backend=backend)
        spectrum = matmul_fp8(transposed(rows, by=z.scales, backend=backend), other, dtype)
        if dz is not None:
            setattr(dz, _TURNED, other)
    return dz, spectrum
