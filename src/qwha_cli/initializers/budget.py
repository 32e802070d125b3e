"""How many entries each row of F gets, and which columns.

Rows share a budget p in proportion to weights w_i, none below a minimum, none above the row's length, and the sum is exactly p:
quotas q_i = clamp(λ w_i, lo, hi) with the λ that makes them sum to p, then largest-remainder rounding. This is the paper's Eq. 7
(p_i = p · w_i / Σ w) with its promise of two entries a row and its cap kept, which the authors' code does not do. All ties are
broken by the lower index, so that every device and every run chooses the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwha_cli.errors import NumericsError
from qwha_cli.kernels.chunks import chunks

# rows of zero weight count as this share of the heaviest, so that they take what all others cannot hold
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class InitOptions:
    """What an initializer may be told.

    Attributes:
        temperature: t of the paper's Eq. 7; 0 gives all rows the same, larger values favour the worst rows.
        damping: Added to the Gram matrix's diagonal, as a share of its mean; None for the method's own.
        min_per_row: Entries every row gets at least (all of a shorter row).
        selection: How columns are chosen in a row; `magnitude` takes the largest |delta|.
        seed: Of random places.
        stages: Pursuit: shares in which the budget is spent.
        exchanges: Pursuit: rounds of exchange at most.
        tolerance: Pursuit: an exchange that takes off less than this share of the error is followed by a smaller one, or the end.
        dtype: Precision of the refinement. The values come out in float32 in any case.
    """

    temperature: float = 1.0
    damping: float | None = None
    min_per_row: int = 2
    selection: Literal["magnitude"] = "magnitude"
    seed: int = 0
    stages: int = 3
    exchanges: int = 8
    tolerance: float = 5e-3
    dtype: Literal["float32", "float64"] = "float32"

    def damping_or(self, own: float) -> float:
        """The damping asked for, else the method's own."""
        return own if self.damping is None else self.damping

    @property
    def torch_dtype(self) -> torch.dtype:
        """The refinement's dtype."""
        return torch.float64 if self.dtype == "float64" else torch.float32


def allocate(weights: Tensor, budget: int, *, minimum: int, maximum: int) -> Tensor:
    """Share a budget among rows in proportion to weights.

    Args:
        weights: (rows,), floating, finite, >= 0. All zero means all alike.
        budget: Entries to share.
        minimum: Entries of each row at least (`maximum` if that is less).
        maximum: Entries of each row at most.

    Returns:
        (rows,) int64 on the device of weights, summing to budget.

    Raises:
        NumericsError: A weight is not finite or negative, or the budget lies outside rows · minimum .. rows · maximum.
    """
    minimum = min(minimum, maximum)
    _check_fits(weights.numel(), budget, minimum, maximum)
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise NumericsError("the rows' errors are not all finite and non-negative", remedy="check the calibration data")
    # on the CPU in float64: a few thousand numbers, and the same result whatever device they come from
    shares = weights.detach().to(device="cpu", dtype=torch.float64)
    peak = shares.max()
    shares = torch.ones_like(shares) if peak == 0 else (shares / peak).clamp(min=_NEGLIGIBLE)
    quotas = (_level(shares, budget, minimum, maximum) * shares).clamp(minimum, maximum)
    return _round(quotas, budget, minimum, maximum).to(weights.device)


def check_budget(delta: Tensor, budget: int, *, minimum: int) -> None:
    """Refuse a budget that a matrix (out, in) cannot take, and a matrix that is not finite.

    Raises:
        NumericsError: Either.
    """
    out_features, in_features = delta.shape
    _check_fits(out_features, budget, min(minimum, in_features), in_features)
    if not bool(torch.isfinite(delta).all()):
        raise NumericsError("the quantization error is not finite", remedy="check the quantized base and the model's weights")


def _check_fits(rows: int, budget: int, minimum: int, maximum: int) -> None:
    if not rows * minimum <= budget <= rows * maximum:
        raise NumericsError(
            f"a budget of {budget} entries does not fit {rows} rows of {minimum} to {maximum} entries each",
            remedy="raise adapter.rank or lower init.min_per_row" if budget < rows * minimum else "lower adapter.rank",
        )


def select(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the counts[i] highest scores of each row; ties go to the lower column.

    Args:
        scores: (rows, columns), floating.
        counts: (rows,) int64, each at most columns.

    Returns:
        (rows, columns) bool.
    """
    columns = scores.shape[1]
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    ranks = torch.arange(columns, device=scores.device)
    # sorting holds an int64 and a score for each entry
    for rows in chunks(scores.shape[0], 16 * columns):
        order = scores[rows].argsort(dim=1, descending=True, stable=True)
        mask[rows] = torch.zeros_like(mask[rows]).scatter_(1, order, ranks < counts[rows, None])
    return mask


def _level(shares: Tensor, budget: int, minimum: int, maximum: int) -> float:
    """The λ with Σ clamp(λ w_i, minimum, maximum) = budget, exact: the sum is linear between the rows' break points."""
    breaks = torch.cat([minimum / shares, maximum / shares]).sort().values

    def total(level: float) -> float:
        return float((level * shares).clamp(minimum, maximum).sum())

    low, high = 0, breaks.numel() - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if total(float(breaks[middle])) >= budget else (middle + 1, high)
    if low == 0:
        return float(breaks[0])
    left, right = float(breaks[low - 1]), float(breaks[low])
    below, above = total(left), total(right)
    return right if above <= below else left + (right - left) * (budget - below) / (above - below)


def _round(quotas: Tensor, budget: int, minimum: int, maximum: int) -> Tensor:
    """Largest-remainder rounding to a sum of exactly `budget`, within the limits."""
    # a quota that is a whole number up to rounding must not lose a unit to it
    counts = (quotas + 1e-9).floor().clamp(minimum, maximum)
    remainders = quotas - counts
    while (missing := budget - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        open_rows = counts < maximum if step > 0 else counts > minimum
        order = torch.where(open_rows, step * remainders, -torch.inf).argsort(descending=True, stable=True)
        chosen = order[: min(abs(missing), int(open_rows.sum()))]
        counts[chosen] += step
        remainders[chosen] -= step
    return counts.to(torch.int64)
