"""The orthonormal Walsh-Hadamard transform of the last dimension: x @ H and x @ Hᵀ, for any size that `plan` accepts.

H_b = (A ⊗ C) / sqrt(b) with A = base ⊗ Sylvester(2^j) and C = Sylvester(2^(k−j)), a and c balanced. A row of x seen as an (a, c)
matrix X becomes Aᵀ X C: two small dense products, O(n (a + c)), on every device faster than a butterfly of torch operations. Made
of plain torch operations, so autograd differentiates it (the gradient is the transposed transform). H_n is never built unless n
is small. Sources: paper App. B.1; the Kronecker identity (A ⊗ C)ᵀ vec(X) = vec(Aᵀ X C), row-major.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from qwha_cli.kernels.hadamard import base_matrix, plan

_HALF = (torch.float16, torch.bfloat16)
# below this one dense product is as fast as two
_SMALL_BLOCK = 64


def wht(x: Tensor, *, transpose: bool = False) -> Tensor:
    """Multiply the last dimension by H (or Hᵀ).

    Args:
        x: (..., n), floating, any device.
        transpose: Multiply by Hᵀ, which undoes H.

    Returns:
        (..., n), dtype and device of x. Half precision is computed in float32 on the CPU, and elsewhere in its own dtype with the
        matrix product's float32 accumulation.

    Raises:
        KernelError: n < 1.
    """
    # a CPU multiplies float32 faster than half precision in matrices this small, and rounds once instead of three times
    dtype = torch.float32 if x.dtype in _HALF and x.device.type == "cpu" else x.dtype
    return _multiply(x.to(dtype), transpose).to(x.dtype)


def transform_gram(gram: Tensor) -> Tensor:
    """The Gram matrix of transformed inputs: Hᵀ G H, where G = XᵀX and the inputs become X H.

    Args:
        gram: (n, n), symmetric, floating.

    Returns:
        (n, n), dtype and device of gram; symmetric to the last bit.
    """
    both = wht(wht(gram).mT).mT
    return (both + both.mT) / 2


def _multiply(x: Tensor, transpose: bool) -> Tensor:
    """The two products, in x's own dtype."""
    left, right, factor = _factors(x.shape[-1], x.dtype, x.device, transpose)
    rows = x.reshape(-1, right.shape[0])
    if right.shape[0] > 1:
        rows = rows @ right
    blocks = rows.reshape(-1, left.shape[0], right.shape[0])
    # alpha multiplies the float32 sums, so that half precision rounds twice and not three times
    copies = left.expand(blocks.shape[0], -1, -1)
    return torch.baddbmm(blocks.new_zeros(()), copies, blocks, beta=0, alpha=factor).reshape(x.shape)


@lru_cache(maxsize=128)
def _factors(size: int, dtype: torch.dtype, device: torch.device, transpose: bool) -> tuple[Tensor, Tensor, float]:
    """(L, R, f) so that x becomes f · L X R per block: L (a, a), R (c, c).

    The entries are ± a power of two, so that they are exact in every dtype and half-precision sums stay in range; what the powers
    leave of 1/sqrt(b) is f, between 1/2 and 2.
    """
    chosen = plan(size)
    split = min(range(chosen.log2 + 1), key=lambda j: chosen.base * 2**j + 2 ** (chosen.log2 - j))
    if chosen.block <= _SMALL_BLOCK:
        split = chosen.log2
    with torch.inference_mode(False):
        left = torch.kron(base_matrix(chosen.base), base_matrix(2**split))
        right = base_matrix(2 ** (chosen.log2 - split))
        # x A has the kernel Aᵀ on the left of X; Sylvester's matrix is symmetric
        left = left if transpose else left.mT
        scales = [2.0 ** -(order.bit_length() // 2) for order in (left.shape[0], right.shape[0])]
        scaled = [(m.to(dtype) * s).contiguous().to(device) for m, s in zip((left, right), scales, strict=True)]
    factor = 1 / (math.sqrt(chosen.block) * scales[0] * scales[1])
    return scaled[0], scaled[1], factor
