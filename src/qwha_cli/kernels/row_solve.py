"""Solve for all sparse rows at once: x_S = G_SS⁻¹ b_S for each row's own set of places S, and what each entry of x is worth.

In torch, rows of similar length are solved together by batched Cholesky factorisations, padded with rows of the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested, choose
from qwha_cli.kernels.chunks import chunks

OP = "row_solve"


@dataclass(frozen=True, eq=False)
class Solved:
    """Solutions of all rows, entry by entry.

    Attributes:
        values: (nnz,) float32, x.
        losses: (nnz,) float32 or None, x_j² / (G_SS⁻¹)_jj: by how much the row's xᵀ G x / 2 − bᵀ x, twice over, grows when the
            entry leaves and the row's others are solved for again.
        failed: () integer, how many rows' sub-matrices are not positive definite; their numbers mean nothing.
    """

    values: Tensor
    losses: Tensor | None
    failed: Tensor


def row_solve(
    gram: Tensor, right: Tensor, row_starts: Tensor, columns: Tensor, *, with_losses: bool = False, backend: Requested = "auto"
) -> Solved:
    """Solve G_SS x_S = b_S for every row.

    Args:
        gram: (in + 1, in + 1), float32 or float64, symmetric, its last row and column zero: where padding points to.
        right: (out, in), dtype of gram, b.
        row_starts: (out + 1,) int32; row i holds places row_starts[i] .. row_starts[i + 1] − 1.
        columns: (nnz,) int32, the places S of each row, without repeats.
        with_losses: Whether the losses are wanted too.
        backend: Which implementation; Triton's is for float32, and `auto` takes torch for float64.

    Raises:
        KernelError: Shapes or dtypes that do not fit, or a backend that this machine does not have.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or right.shape != (row_starts.numel() - 1, gram.shape[0] - 1):
        raise KernelError(
            f"a square matrix with a border and right sides, got {tuple(gram.shape)}, {tuple(right.shape)} and "
            f"{row_starts.numel() - 1} rows",
            where=OP,
        )
    if gram.dtype != torch.float32 and backend == "triton":
        raise KernelError(f"the Triton kernel solves in float32, got {gram.dtype}", where=OP, remedy="use backend auto or torch")
    if not columns.numel():
        nothing = torch.zeros(0, dtype=torch.float32, device=gram.device)
        return Solved(nothing, nothing if with_losses else None, torch.zeros((), dtype=torch.int64, device=gram.device))
    if gram.dtype == torch.float32 and choose(backend, op=OP, device=gram.device).name == "triton":
        from qwha_cli.kernels import row_solve_triton

        return Solved(*row_solve_triton.row_solve(gram, right, row_starts, columns, with_losses=with_losses))
    return _in_torch(gram, right, row_starts, columns, with_losses=with_losses)


def _in_torch(gram: Tensor, right: Tensor, row_starts: Tensor, columns: Tensor, *, with_losses: bool) -> Solved:
    size, entries = gram.shape[0] - 1, columns.numel()
    counts = (row_starts[1:] - row_starts[:-1]).to(torch.int64)
    # padding is written to a place of its own behind the last entry: boolean indices would make a GPU wait for each bucket
    values = torch.zeros(entries + 1, dtype=torch.float32, device=gram.device)
    losses = torch.zeros_like(values) if with_losses else None
    failed = torch.zeros((), dtype=torch.int64, device=gram.device)
    for members, width in _buckets(counts, gram.element_size()):
        slots = torch.arange(width, device=members.device)
        valid = slots < counts[members, None]
        entry = row_starts[members].to(torch.int64)[:, None] + slots * valid
        own = torch.where(valid, columns[entry].to(torch.int64), size)
        known = right[members].gather(1, own.clamp_max(size - 1)) * valid
        solved, worth, broken = _solve(gram, own, valid, known, with_losses=with_losses)
        slots_of = torch.where(valid, entry, entries)
        values[slots_of] = solved.to(torch.float32)
        if losses is not None and worth is not None:
            losses[slots_of] = worth.to(torch.float32)
        failed += broken
    return Solved(values[:-1], None if losses is None else losses[:-1], failed)


def _buckets(counts: Tensor, element_size: int) -> Iterator[tuple[Tensor, int]]:
    """(row numbers, padded length): rows of similar length, as many as fit the memory bound; empty rows are left out."""
    order = counts.argsort(stable=True)
    lengths, sizes = counts[order].unique_consecutive(return_counts=True)
    # a bucket spans an eighth of its length, at most 1.4 times the work
    span, slack = 1.125, 4
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
        for part in chunks(total, 3 * element_size * length * length):
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
    factor, info = torch.linalg.cholesky_ex(_sub_matrices(gram, columns))
    failed = (info > 0).sum()
    if not with_losses:
        return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0], None, failed
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    # X L = I: from this side it takes half of the time on a CPU. With L⁻¹ at hand, x = L⁻ᵀ L⁻¹ right
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False, left=False)
    solved = (inverse.mT @ (inverse @ right[:, :, None]))[:, :, 0]
    return solved, solved.square() / inverse.square().sum(dim=1) * valid, failed


def _sub_matrices(gram: Tensor, columns: Tensor) -> Tensor:
    """G_SS (batch, width, width) of sets (batch, width), the identity where the padding is."""
    gathered = gram[columns[:, :, None], columns[:, None, :]]
    gathered.diagonal(dim1=1, dim2=2).masked_fill_(columns == gram.shape[0] - 1, 1.0)
    return gathered
