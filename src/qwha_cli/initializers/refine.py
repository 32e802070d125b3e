"""The best values of F at given places, and the error that is left.

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
    mean = float(gram.diagonal().double().mean())
    # without any activation every value is as good as any other: a ridge of 1 then gives x = delta at the places
    ridge = damping * mean if mean > 0 else 1.0
    narrow_delta, narrow_gram = delta.to(dtype), gram.to(dtype)
    counts = rows.counts().to(torch.int64)
    values = torch.zeros(rows.columns.numel(), dtype=torch.float32, device=delta.device)
    for members, width in _buckets(counts, narrow_gram.element_size()):
        entry, valid = _entries(rows, members, counts, width)
        columns = rows.columns[entry].to(torch.int64)
        try:
            solved = _solve(narrow_delta[members], narrow_gram, columns, valid, ridge=ridge)
        except NumericsError:
            if dtype == torch.float64:
                raise
            solved = _solve(delta[members].double(), gram.double(), columns, valid, ridge=ridge)
        values[entry[valid]] = solved[valid].to(torch.float32)
    return rows.with_values(values)


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


def residual_error(delta: Tensor, rows: SparseRows | None, gram: Tensor) -> float:
    """Squared output error of the whole layer, tr((D − F) G (D − F)ᵀ); F = 0 for rows = None."""
    return float(row_errors(delta, rows, gram).sum(dtype=torch.float64))


def _buckets(counts: Tensor, element_size: int) -> Iterator[tuple[Tensor, int]]:
    """(row numbers, padded length): rows of similar length, as many as fit the memory bound; empty rows are left out."""
    order = counts.argsort(stable=True)
    lengths, sizes = counts[order].unique_consecutive(return_counts=True)
    start = 0
    pending: list[tuple[int, int]] = []
    table = [*zip(lengths.tolist(), sizes.tolist(), strict=True)]
    for index, (length, size) in enumerate(table):
        if length == 0:
            start += size
            continue
        pending.append((length, size))
        # a bucket spans an eighth of its length: at most 1.4 times the work, and some tens of buckets
        if index + 1 < len(table) and table[index + 1][0] <= max(pending[0][0] * 1.125, pending[0][0] + 4):
            continue
        total = sum(size for _, size in pending)
        # the sub-matrix, its factor and the mask that pads it live at once
        for part in chunks(total, (2 * element_size + 1) * length * length):
            yield order[start : start + total][part], length
        start += total
        pending = []


def _entries(rows: SparseRows, members: Tensor, counts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(entry numbers, valid), both (members, width); a row's padding points at its first entry."""
    slots = torch.arange(width, device=members.device)
    valid = slots < counts[members, None]
    return rows.row_starts[members].to(torch.int64)[:, None] + slots * valid, valid


def _solve(delta: Tensor, gram: Tensor, columns: Tensor, valid: Tensor, *, ridge: float) -> Tensor:
    """Solve (G + ridge)_SS x = ((G + ridge) x_0)_S for a batch of padded rows.

    Args:
        delta: (batch, in), the rows x_0.
        gram: (in, in), of delta's dtype.
        columns: (batch, width) int64, the places S.
        valid: (batch, width) bool, False in the padding.
        ridge: Added to the diagonal.

    Returns:
        (batch, width), zero in the padding.

    Raises:
        NumericsError: A sub-matrix is not positive definite in this dtype.
    """
    matrix = gram[columns[:, :, None], columns[:, None, :]]
    matrix.masked_fill_(~(valid[:, :, None] & valid[:, None, :]), 0)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    undamped = diagonal.clone()
    diagonal.copy_(torch.where(valid, undamped + ridge, 1.0))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise NumericsError(
            f"{int((failed > 0).sum())} of {len(failed)} sub-matrices of the Gram matrix are not positive definite",
            remedy="raise init.damping, or calibrate with more samples",
        )
    target = (delta @ gram).gather(1, columns) * valid
    right = target + ridge * delta.gather(1, columns) * valid
    solved = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0] * valid
    diagonal.copy_(undamped)
    return _never_worse(solved, matrix, target)


def _never_worse(solved: Tensor, matrix: Tensor, target: Tensor) -> Tensor:
    """Replace rows that damping made worse than zero by their best multiple, which never is."""
    linear = (solved * target).sum(dim=1)
    quadratic = ((matrix @ solved[:, :, None])[:, :, 0] * solved).sum(dim=1)
    # error(s x) = error(0) − 2 s · linear + s² · quadratic
    best = torch.where(quadratic > 0, linear / quadratic.clamp(min=torch.finfo(quadratic.dtype).tiny), 0.0)
    return torch.where((2 * linear < quadratic)[:, None], solved * best[:, None], solved)
