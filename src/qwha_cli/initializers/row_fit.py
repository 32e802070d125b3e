"""The best values of F at given places, for all rows at once.

For each row x_0 of delta and its places S, the x that is zero outside S and minimises (x_0 − x) G (x_0 − x)ᵀ is
x_S = G_SS⁻¹ (G x_0ᵀ)_S (paper Eq. 9 written in the Gram matrix of the adapter's domain: no square root of G is needed). Rows of
similar length are solved together by batched Cholesky factorisations, padded with identity rows. G is damped on both sides of the
equation, so that a support of all columns gives x = x_0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwha_cli.errors import NumericsError
from qwha_cli.initializers.budget import chunks
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.sub_matrices import sub_matrices


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
        counts = rows.counts().to(torch.int64)
        # padding is written to a place of its own behind the last entry: boolean indices would make a GPU wait for each bucket
        values = torch.zeros(rows.columns.numel() + 1, dtype=torch.float32, device=self._delta.device)
        losses = torch.zeros_like(values) if with_losses else None
        failures: list[Tensor] = []
        for members, width in _buckets(counts, self._padded.element_size()):
            slots = torch.arange(width, device=members.device)
            valid = slots < counts[members, None]
            entry = rows.row_starts[members].to(torch.int64)[:, None] + slots * valid
            columns = torch.where(valid, rows.columns[entry].to(torch.int64), self.gram.shape[0])
            right = self._right[members].gather(1, columns.clamp_max(self.gram.shape[0] - 1)) * valid
            solved, worth, failed = _solve(self._padded, columns, valid, right, with_losses=with_losses)
            slots_of = torch.where(valid, entry, rows.columns.numel())
            values[slots_of] = solved.to(torch.float32)
            if losses is not None and worth is not None:
                losses[slots_of] = worth.to(torch.float32)
            failures.append(failed)
        broken = int(torch.stack(failures).sum()) if failures else 0
        if broken and self._dtype == torch.float64:
            raise NumericsError(
                f"{broken} of {int((counts > 0).sum())} sub-matrices of the Gram matrix are not positive definite",
                remedy="raise init.damping, or calibrate with more samples",
            )
        if broken:
            exact = RowFit(self._delta, self._source, damping=self._damping, dtype=torch.float64)
            return exact.fit(rows, with_losses=with_losses)
        return values[:-1], None if losses is None else losses[:-1]


def _buckets(counts: Tensor, element_size: int) -> Iterator[tuple[Tensor, int]]:
    """(row numbers, padded length): rows of similar length, as many as fit the memory bound; empty rows are left out."""
    order = counts.argsort(stable=True)
    lengths, sizes = counts[order].unique_consecutive(return_counts=True)
    # a bucket spans an eighth of its length on a CPU: at most 1.4 times the work. On a GPU the launches of a bucket cost more
    # than its arithmetic, so there are few
    span, slack, times = (1.125, 4, 1) if counts.device.type == "cpu" else (2.0, 64, 4)
    start = 0
    pending: list[tuple[int, int]] = []
    table = [*zip(lengths.tolist(), sizes.tolist(), strict=True)]
    for index, (length, size) in enumerate(table):
        if length == 0:
            start += size
            continue
        pending.append((length, size))
        if index + 1 < len(table) and table[index + 1][0] <= max(pending[0][0] * span, pending[0][0] + slack):
            continue
        total = sum(size for _, size in pending)
        # the sub-matrix, its factor and the factor's inverse live at once
        for part in chunks(total, 3 * element_size * length * length, times=times):
            yield order[start : start + total][part], length
        start += total
        pending = []


def _solve(
    gram: Tensor, columns: Tensor, valid: Tensor, right: Tensor, *, with_losses: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Solve G_SS x = right for a batch of padded rows.

    Args:
        gram: (in + 1, in + 1), damped, its last row and column zero.
        columns: int64 (batch, width); `in` in the padding.
        valid: bool (batch, width), where there is no padding.
        right: (batch, width), zero in the padding.
        with_losses: Whether the losses are wanted too.

    Returns:
        x and losses (batch, width), zero in the padding; the number of sub-matrices that are not positive definite, ().
    """
    factor, info = torch.linalg.cholesky_ex(sub_matrices(gram, columns))
    failed = (info > 0).sum()
    if not with_losses:
        return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0], None, failed
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    # X L = I: from this side it takes half of the time on a CPU. With L⁻¹ at hand, x = L⁻ᵀ L⁻¹ right
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False, left=False)
    solved = (inverse.mT @ (inverse @ right[:, :, None]))[:, :, 0]
    return solved, solved.square() / inverse.square().sum(dim=1) * valid, failed
