"""The best values of F at given places, and the error that is left.

For each row x_0 of delta and its places S, the x that is zero outside S and minimises (x_0 − x) G (x_0 − x)ᵀ is
x_S = G_SS⁻¹ (G x_0ᵀ)_S (paper Eq. 9 written in the Gram matrix of the adapter's domain: no square root of G is needed). Rows of
similar length are solved together by batched Cholesky factorisations, padded with identity rows. G is damped on both sides of the
equation, so that a support of all columns gives x = x_0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qwha_cli.errors import NumericsError
from qwha_cli.initializers.budget import chunks
from qwha_cli.kernels.sparse_matmul import SparseRows


def refine(delta: Tensor, gram: Tensor, rows: SparseRows, *, damping: float, dtype: torch.dtype) -> SparseRows:
    """Values that minimise the output error at the given places.

    Args:
        delta: (out, in), what F should reproduce, in the adapter's domain.
        gram: (in, in), Gram matrix of the inputs in the adapter's domain.
        rows: The places; their values are not read.
        damping: Added to gram's diagonal, as a share of its mean.
        dtype: float32 or float64, of the computation. A factorisation that fails in float32 is repeated in float64.

    Returns:
        The same places with float32 values. No row's error is above that of F = 0, up to rounding.

    Raises:
        NumericsError: A damped sub-matrix is not positive definite even in float64.
    """
    values, _ = fit(delta, gram, rows, damping=damping, dtype=dtype)
    fitted = rows.with_values(values)
    # damping can make a row worse than zero on the inputs as they are: then its best multiple, which never is
    dense = fitted.dense(dtype)
    linear, quadratic = _along(dense, delta.to(dtype), gram.to(dtype))
    best = torch.where(quadratic > 0, linear / quadratic.clamp(min=torch.finfo(dtype).tiny), 0.0)
    factors = torch.where(2 * linear < quadratic, best, 1.0).to(torch.float32)
    return rows.with_values(values * factors[rows.row_index()])


def _along(values: Tensor, delta: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's x G x_0ᵀ and x G xᵀ: its error is error(0) − 2 s · first + s² · second when x is multiplied by s."""
    turned = values @ gram
    return (turned * delta).sum(dim=1), (turned * values).sum(dim=1)


def fit(
    delta: Tensor, gram: Tensor, rows: SparseRows, *, damping: float, dtype: torch.dtype, with_losses: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The best values at the given places and, on request, what each of them is worth.

    Args:
        delta: As in `refine`.
        gram: As in `refine`.
        rows: As in `refine`.
        damping: As in `refine`.
        dtype: As in `refine`.
        with_losses: Whether to compute the second result.

    Returns:
        values float32 (nnz,); losses float32 (nnz,) or None: by how much the damped error grows when this entry leaves and its
        row's others are fitted again, x_j² / (G_SS⁻¹)_jj.

    Raises:
        NumericsError: A damped sub-matrix is not positive definite even in float64.
    """
    mean = float(gram.diagonal().double().mean())
    # without any activation every value is as good as any other: a ridge of 1 then gives x = delta at the places
    ridge = damping * mean if mean > 0 else 1.0
    narrow_delta, narrow_gram = delta.to(dtype), gram.to(dtype)
    target = narrow_delta @ narrow_gram
    counts = rows.counts().to(torch.int64)
    # padding is written to a place of its own behind the last entry: boolean indices would make a GPU wait for each bucket
    values = torch.zeros(rows.columns.numel() + 1, dtype=torch.float32, device=delta.device)
    losses = torch.zeros_like(values) if with_losses else None
    for members, width in _buckets(counts, narrow_gram.element_size()):
        entry, valid = _entries(rows, members, counts, width)
        columns = rows.columns[entry].to(torch.int64)
        batch = _Batch(narrow_delta[members].gather(1, columns), target[members].gather(1, columns), columns, valid)
        try:
            solved, worth = _solve(batch, narrow_gram, ridge=ridge, with_losses=with_losses)
        except NumericsError:
            if dtype == torch.float64:
                raise
            exact = delta[members].double()
            batch = _Batch(exact.gather(1, columns), (exact @ gram.double()).gather(1, columns), columns, valid)
            solved, worth = _solve(batch, gram.double(), ridge=ridge, with_losses=with_losses)
        slots = torch.where(valid, entry, rows.columns.numel())
        values[slots] = solved.to(torch.float32)
        if losses is not None and worth is not None:
            losses[slots] = worth.to(torch.float32)
    return values[:-1], None if losses is None else losses[:-1]


def row_errors(delta: Tensor, rows: SparseRows | None, gram: Tensor) -> Tensor:
    """Squared output error of each row: (x_0 − x) G (x_0 − x)ᵀ.

    Args:
        delta: (out, in).
        rows: F, or None for F = 0.
        gram: (in, in).

    Returns:
        (out,) in float64 if gram or delta is, else float32; rounding below zero is cut off.
    """
    dtype = torch.promote_types(delta.dtype, gram.dtype)
    rest = delta.to(dtype) if rows is None else delta.to(dtype) - rows.dense(dtype)
    return ((rest @ gram.to(dtype)) * rest).sum(dim=1).clamp(min=0)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows of similar length, padded: what F should be at their places, and (D G) there; all (batch, width)."""

    delta: Tensor
    target: Tensor
    columns: Tensor
    valid: Tensor


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
        # the sub-matrix, its factor, the factor's inverse and the mask that pads it live at once
        for part in chunks(total, (3 * element_size + 1) * length * length, times=times):
            yield order[start : start + total][part], length
        start += total
        pending = []


def _entries(rows: SparseRows, members: Tensor, counts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(entry numbers, valid), both (members, width); a row's padding points at its first entry."""
    slots = torch.arange(width, device=members.device)
    valid = slots < counts[members, None]
    return rows.row_starts[members].to(torch.int64)[:, None] + slots * valid, valid


def _solve(batch: _Batch, gram: Tensor, *, ridge: float, with_losses: bool) -> tuple[Tensor, Tensor | None]:
    """Solve (G + ridge)_SS x = ((G + ridge) x_0)_S for a batch of padded rows.

    Args:
        batch: The rows, of gram's dtype.
        gram: (in, in).
        ridge: Added to the diagonal.
        with_losses: Whether the losses are wanted too.

    Returns:
        x and losses (batch, width), zero in the padding.

    Raises:
        NumericsError: A sub-matrix is not positive definite in this dtype.
    """
    valid = batch.valid
    matrix = gram[batch.columns[:, :, None], batch.columns[:, None, :]]
    matrix.masked_fill_(~(valid[:, :, None] & valid[:, None, :]), 0)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(valid, diagonal + ridge, 1.0))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise NumericsError(
            f"{int((failed > 0).sum())} of {len(failed)} sub-matrices of the Gram matrix are not positive definite",
            remedy="raise init.damping, or calibrate with more samples",
        )
    right = (batch.target + ridge * batch.delta) * valid
    solved = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0] * valid
    losses = None
    if with_losses:
        identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device).expand_as(factor)
        # X L = I: from this side it takes half of the time on a CPU
        inverse_diagonal = torch.linalg.solve_triangular(factor, identity, upper=False, left=False).square().sum(dim=1)
        losses = solved.square() / inverse_diagonal * valid
    return solved, losses
