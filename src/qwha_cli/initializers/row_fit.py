"""The best values of F at given places, for all rows at once.

For each row x_0 of delta and its places S, the x that is zero outside S and minimises (x_0 − x) G (x_0 − x)ᵀ is
x_S = G_SS⁻¹ (G x_0ᵀ)_S (paper Eq. 9 written in the Gram matrix of the adapter's domain: no square root of G is needed). G is
damped on both sides of the equation, so that a support of all columns gives x = x_0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.errors import NumericsError
from qwha_cli.kernels.row_solve import row_solve
from qwha_cli.kernels.sparse_matmul import SparseRows


class RowFit:
    """Solves for one delta and one Gram matrix at any places; what does not depend on the places is computed once.

    Args:
        delta: (out, in), what F should reproduce, in the adapter's domain.
        gram: (in, in), Gram matrix of the inputs in the adapter's domain, same device.
        damping: Added to gram's diagonal, as a share of its mean; without any activation all places are worth the same.
        dtype: float32 or float64, of the computation. A factorisation that fails in float32 is repeated in float64.

    Attributes:
        gram: (in, in) of dtype, damped.
    """

    def __init__(self, delta: Tensor, gram: Tensor, *, damping: float, dtype: torch.dtype) -> None:
        self._delta = delta
        self._source = gram
        self._damping = damping
        self._dtype = dtype
        size = gram.shape[0]
        mean = float(gram.diagonal().double().mean())
        # one more row and column of zeros: where the padding of a short row points to
        self._padded = torch.zeros((size + 1, size + 1), dtype=dtype, device=gram.device)
        self.gram = self._padded[:size, :size]
        self.gram.copy_(gram)
        self.gram.diagonal().add_(damping * mean if mean > 0 else 1.0)
        self._right = delta.to(dtype) @ self.gram

    def fit(self, rows: SparseRows, *, with_losses: bool = False) -> tuple[Tensor, Tensor | None]:
        """The best values at the given places and, on request, what each of them is worth.

        Args:
            rows: The places; their values are not read.
            with_losses: Whether to compute the second result.

        Returns:
            values float32 (nnz,); losses float32 (nnz,) or None: by how much the damped error grows when this entry leaves and
            its row's others are fitted again, x_j² / (G_SS⁻¹)_jj.

        Raises:
            NumericsError: A damped sub-matrix is not positive definite even in float64.
        """
        solved = row_solve(self._padded, self._right, rows.row_starts, rows.columns, with_losses=with_losses)
        broken = int(solved.failed)
        if broken and self._dtype == torch.float64:
            raise NumericsError(
                f"{broken} of {int((rows.counts() > 0).sum())} sub-matrices of the Gram matrix are not positive definite",
                remedy="raise init.damping, or calibrate with more samples",
            )
        if broken:
            exact = RowFit(self._delta, self._source, damping=self._damping, dtype=torch.float64)
            return exact.fit(rows, with_losses=with_losses)
        return solved.values, solved.losses
