"""Values of F for places that were chosen otherwise, and the error that is left."""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.initializers.row_fit import RowFit
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
    values, _ = RowFit(delta, gram, damping=damping, dtype=dtype).fit(rows)
    return never_worse(delta, gram, rows.with_values(values), dtype=dtype)


def never_worse(delta: Tensor, gram: Tensor, rows: SparseRows, *, dtype: torch.dtype) -> SparseRows:
    """Replace rows that are worse than zero by their best multiple, which never is.

    Damping can do that: values that are best for the damped Gram matrix need not be good for the inputs as they are.

    Args:
        delta: As in `refine`.
        gram: As in `refine`, without damping.
        rows: F.
        dtype: float32 or float64, of the computation.

    Returns:
        F with the same places, values of the dtype they had.
    """
    dense = rows.dense(dtype)
    linear, quadratic = _along(dense, delta.to(dtype), gram.to(dtype))
    best = torch.where(quadratic > 0, linear / quadratic.clamp(min=torch.finfo(dtype).tiny), 0.0)
    factors = torch.where(2 * linear < quadratic, best, 1.0).to(rows.values.dtype)
    return rows.with_values(rows.values * factors[rows.row_index()])


def _along(values: Tensor, delta: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's x G x_0ᵀ and x G xᵀ: its error is error(0) − 2 s · first + s² · second when x is multiplied by s."""
    turned = values @ gram
    return (turned * delta).sum(dim=1), (turned * values).sum(dim=1)


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
