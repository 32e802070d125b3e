"""float32 products on the tensor cores.

A GPU multiplies half-precision matrices many times as fast as float32 ones. With a = a₁ + a₂ and b = b₁ + b₂, each part in
bfloat16, a b ≈ a₁ b₁ + a₂ b₁ + a₁ b₂: 16 bits of each number take part, the sums are float32. Good enough to compare candidates
with, not to solve equations with.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SplitMatrix:
    """The right factor of several products.

    Args:
        matrix: (k, n), float32 or float64. Split if it is float32 on a GPU that has bfloat16; used as it is elsewhere.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self._parts = _split(matrix) if _is_worth_it(matrix) else None

    def multiply(self, left: Tensor) -> Tensor:
        """Return left (m, k) times the matrix, (m, n) of left's dtype; where it is split, with a relative error of about 2⁻¹⁶."""
        if self._parts is None:
            return left @ self._matrix
        high, low = _split(left)
        result = torch.mm(high, self._parts[0], out_dtype=torch.float32)
        result += torch.mm(low, self._parts[0], out_dtype=torch.float32)
        return result.add_(torch.mm(high, self._parts[1], out_dtype=torch.float32))


def _is_worth_it(matrix: Tensor) -> bool:
    on_gpu = matrix.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return on_gpu and matrix.dtype == torch.float32


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    high = matrix.to(torch.bfloat16)
    return high, (matrix - high).to(torch.bfloat16)
