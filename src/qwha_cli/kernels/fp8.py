"""Matrix products of two matrices held as 8-bit floating-point numbers (e4m3), each row with a power of two as its scale.

    A ≈ diag(s) A₈,  |A₈| ≤ 448        A Bᵀ ≈ diag(s_A) A₈ B₈ᵀ diag(s_B)

From compute capability 8.9 on, a GPU multiplies such matrices twice as fast as bfloat16 ones, and adds up in the 14 bits of its
tensor cores, which costs a sum of 8,192 products 0.2 % of its size (an H100). e4m3 has three bits behind the point, so an entry
is off by 1/16 of itself at most, by 2.6 % in the root mean square, and entries down to 2⁻¹³ of their row's largest keep that;
products of Hadamard transforms, which have no outliers, are what this suits. The tensor cores read both matrices along the
dimension that is summed over, so a product with a transpose needs it written anew: `transposed` makes it from the 8-bit numbers
themselves. There one scale has to serve all rows, and as scales are powers of two, changing them moves exponents and rounds
nothing but what falls below 2⁻¹³ of the largest. DeepSeek-V3 (arXiv 2412.19437, §3.3) and torchao train like this, with finer
scales or coarser ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested, choose

OP = "fp8"

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""

MULTIPLE = 16
"""What both dimensions that are no token's must be a multiple of."""

_FIRST_CAPABILITY = (8, 9)
# cuBLAS' kernel for one scale is a fifth faster up to here, and 3 % slower above (an H100, sums of 8,192)
_FEW_RESULTS = 2**24
_MANTISSA = (1 << 23) - 1
# biased, of 2^-63 and 2^63: the product of two scales is a normal float32 number
EXPONENTS = (64, 190)


@dataclass(frozen=True, eq=False)
class Fp8Matrix:
    """A matrix (rows, columns) as 8-bit numbers.

    Attributes:
        values: (rows, columns) float8_e4m3fn, contiguous.
        scales: (rows,) float32, powers of two from 2⁻⁶³ to 2⁶³, or infinite where a row is too large for them: row i is
            scales[i] · values[i].
        uniform: Whether all scales are known to be the same.
    """

    values: Tensor
    scales: Tensor
    uniform: bool = False

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix (rows, columns) that is held, rounded to `dtype`."""
        return (self.values.float() * self.scales.unsqueeze(1)).to(dtype)


def lacks_fp8(device: torch.device) -> str | None:
    """What a device lacks for products of 8-bit numbers, in words; None for nothing: a CPU computes them too, slowly."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        return f"{name} multiplies no 8-bit floating-point numbers (that begins with Ada and Hopper)"
    # whether this torch has scaled rows for this GPU is not written down anywhere
    one = to_fp8(torch.ones(MULTIPLE, MULTIPLE, device=device), backend="torch")
    try:
        matmul_fp8(one, one, torch.bfloat16)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        return f"torch {torch.__version__} multiplies no 8-bit numbers with scaled rows on {name} ({str(error).splitlines()[0]})"
    return None


def to_fp8(x: Tensor, *, backend: Requested = "auto") -> Fp8Matrix:
    """Round a matrix to 8-bit numbers, nearest even, every row with the smallest scale that lets its largest entry fit.

    Args:
        x: (rows, columns), float32, bfloat16 or float16.
        backend: Which implementation; the same to the bit.

    Returns:
        The matrix. What is not finite, or above 4 · 10²¹, makes products that are not finite.

    Raises:
        KernelError: Another dtype or number of dimensions, or `triton` asked for where it does not run.
    """
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(f"8-bit numbers are made of float matrices, got {x.dtype} {tuple(x.shape)}", where=OP)
    if choose(backend, op=OP, device=x.device).name == "triton":
        from qwha_cli.kernels import fp8_triton

        return Fp8Matrix(*fp8_triton.to_fp8(x))
    exact = x.float()
    scales = scale_of(exact.abs().amax(dim=1))
    values = (exact * inverse_of(scales).unsqueeze(1)).clamp(-LARGEST, LARGEST).to(E4M3)
    return Fp8Matrix(values, scales)


def scale_of(bound: Tensor) -> Tensor:
    """The smallest scales, of the shape of `bound` float32, with which numbers up to those fit; infinity where there is none."""
    # the biased exponent of the smallest power of two that is no less
    found = ((bound / LARGEST).view(torch.int32) + _MANTISSA) >> 23
    return _power(found.clamp(*EXPONENTS)).masked_fill(found > EXPONENTS[1], math.inf)


def inverse_of(scales: Tensor) -> Tensor:
    """One over scales, exactly; over the largest there is where they are infinite."""
    return _power(254 - (scales.view(torch.int32) >> 23).clamp(*EXPONENTS))


def both_ways(x: Tensor, *, by: Tensor, backend: Requested = "auto") -> tuple[Fp8Matrix, Fp8Matrix]:
    """A matrix in 8 bits, and `transposed` of that by powers of two: for what is multiplied along its rows and its columns.

    Args:
        x: (rows, columns), as for `to_fp8`, columns a multiple of 16.
        by: (rows,) float32, as for `transposed`.
        backend: Which implementation; the same to the bit.
    """
    if choose(backend, op=OP, device=x.device).name == "triton":
        from qwha_cli.kernels import fp8_triton

        values, scales, moved, whole = fp8_triton.to_fp8_by(x, by)
        a = Fp8Matrix(values, scales)
        return a, Fp8Matrix(*fp8_triton.transposed(values, (moved, whole), padded=_padded(a)), uniform=True)
    a = to_fp8(x, backend=backend)
    return a, transposed(a, by=by, backend=backend)


def transposed(a: Fp8Matrix, *, by: Tensor | None = None, backend: Requested = "auto") -> Fp8Matrix:
    """The transpose, with one scale for all, ready to be multiplied along the rows of `a`.

    Args:
        a: (rows, columns), columns a multiple of 16.
        by: (rows,) float32, powers of two that rows are multiplied by first; None for none.
        backend: Which implementation; the same to the bit.

    Returns:
        (columns, rows rounded up to a multiple of 16), zeros behind the last.

    Raises:
        KernelError: Columns that are no multiple of 16, or `triton` asked for where it does not run.
    """
    scales = a.scales if by is None else a.scales * by
    whole = scales.amax()
    if choose(backend, op=OP, device=a.values.device).name == "triton":
        from qwha_cli.kernels import fp8_triton

        return Fp8Matrix(*fp8_triton.transposed(a.values, (scales, whole), padded=_padded(a)), uniform=True)
    # all powers of two, so this is exact
    moved = (a.values.float() * (scales / whole).unsqueeze(1)).to(E4M3)
    return Fp8Matrix(_turned(moved, _padded(a)), whole.expand(a.values.shape[1]).contiguous(), uniform=True)


def turned(a: Fp8Matrix, *, backend: Requested = "auto") -> Fp8Matrix:
    """The transpose without its scales, as if all were 1; for a product whose other side was multiplied by them.

    In Σ_t (s_t a_t) b_tᵀ it is the size of a product of rows that decides how much a row counts, so that is what the scales of
    both belong to: `turned` of one and `transposed` of the other, by the scales of the first, lose the least.

    Args:
        a: (rows, columns), columns a multiple of 16.
        backend: Which implementation; the same to the bit.

    Returns:
        (columns, rows rounded up to a multiple of 16), zeros behind the last.

    Raises:
        KernelError: Columns that are no multiple of 16, or `triton` asked for where it does not run.
    """
    if choose(backend, op=OP, device=a.values.device).name == "triton":
        from qwha_cli.kernels import fp8_triton

        return Fp8Matrix(*fp8_triton.transposed(a.values, None, padded=_padded(a)), uniform=True)
    return Fp8Matrix(_turned(a.values, _padded(a)), a.scales.new_ones(a.values.shape[1]), uniform=True)


def _padded(a: Fp8Matrix) -> int:
    if a.values.shape[1] % MULTIPLE:
        shape = tuple(a.values.shape)
        raise KernelError(f"8-bit matrices are transposed with columns that are a multiple of {MULTIPLE}, not {shape}", where=OP)
    return -(-a.values.shape[0] // MULTIPLE) * MULTIPLE


def _turned(values: Tensor, padded: int) -> Tensor:
    return F.pad(values.view(torch.uint8).T, (0, padded - values.shape[0])).contiguous().view(E4M3)


def matmul_fp8(a: Fp8Matrix, b: Fp8Matrix, dtype: torch.dtype) -> Tensor:
    """The product A Bᵀ.

    Args:
        a: (m, k), k a multiple of 16.
        b: (n, k), n a multiple of 16.
        dtype: Of the result, bfloat16 on a GPU.

    Returns:
        (m, n), of dtype.

    Raises:
        KernelError: Sizes that do not fit.
    """
    if a.values.shape[1] != b.values.shape[1] or a.values.shape[1] % MULTIPLE or b.values.shape[0] % MULTIPLE:
        sizes = f"{tuple(a.values.shape)} by {tuple(b.values.shape)} transposed"
        raise KernelError(f"8-bit products have inner and outer sizes that are multiples of {MULTIPLE}, not {sizes}", where=OP)
    right = b.scales.unsqueeze(0)
    if a.values.device.type != "cuda":
        return ((a.values.float() @ b.values.float().T) * a.scales.unsqueeze(1) * right).to(dtype)
    count, a = len(a.values), filled(a)
    how, left = ScalingType.RowWise, a.scales.unsqueeze(1)
    if a.uniform and b.uniform and count * len(b.values) <= _FEW_RESULTS:
        how, left, right = ScalingType.TensorWise, a.scales[:1], b.scales[:1]
    found = F.scaled_mm(a.values, b.values.T, left, how, right, how, output_dtype=dtype, use_fast_accum=True)
    return found[:count]


def filled(a: Fp8Matrix) -> Fp8Matrix:
    """The matrix with rows of zeros behind it, up to a multiple of 16, because cuBLAS reads whole vectors of scales."""
    missing = -len(a.values) % MULTIPLE
    if not missing:
        return a
    return Fp8Matrix(F.pad(a.values.view(torch.uint8), (0, 0, 0, missing)).view(E4M3), F.pad(a.scales, (0, missing), value=1.0))


def _power(exponent: Tensor) -> Tensor:
    return (exponent << 23).to(torch.int32).view(torch.float32)
