"""Pursuit: choose the places of F by what they take off the output error, and keep exchanging them while that pays.

    minimise over F with p entries    tr((D − F) G (D − F)ᵀ),    G the damped Gram matrix in the adapter's domain

With the residual's slope P = (D − F) G, a new entry at (i, j) lowers the error by P_ij² / G_jj (all others as they are), and
taking out the entry x_j of a row raises it by x_j² / (G_SS⁻¹)_jj (all others of the row refitted).

1. *Pursuit* (orthogonal matching pursuit, Pati et al. 1993, a share of the budget at a time): the places with the largest gain in
   the whole layer join, then every row's values are fitted anew. Rows compete, so the budget is shared by marginal gain.
2. *Exchange* (as hard thresholding pursuit and Efroymson's stepwise selection do): a share of the places with the smallest loss
   leaves, as many with the largest gain join, then all values are fitted. Kept if the error fell, else tried with fewer places;
   the end is when a round gains too little.

A stage is one product with G and one solve of all rows, which gives values and losses alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwha_cli.initializers.budget import InitOptions, check_budget, select
from qwha_cli.initializers.refine import never_worse
from qwha_cli.initializers.row_fit import RowFit
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.split_matmul import SplitMatrix

# what the calibration text does not show is not trusted; at 65,000 tokens a hundredth is as good on other text (docs/decisions)
_DAMPING = 0.1
# the share of the places that an exchange tries, and the least: below, there is nothing worth a round
_FIRST_SHARE = 0.3
_LAST_SHARE = 0.02


def initialize(delta: Tensor, gram: Tensor, *, budget: int, options: InitOptions) -> SparseRows:
    """Choose places and values of F so that F approximates delta on the calibration inputs.

    Args:
        delta: (out, in), float32 or float64, in the adapter's domain.
        gram: (in, in), Gram matrix of the inputs in the adapter's domain, same device.
        budget: Entries of F, exactly.
        options: damping, min_per_row, stages, exchanges, tolerance and dtype are read.

    Returns:
        F with `budget` entries, float32 values.

    Raises:
        NumericsError: A budget that does not fit, numbers that are not finite, a factorisation that failed.
    """
    check_budget(delta, budget, minimum=options.min_per_row)
    dtype = options.torch_dtype
    row_fit = RowFit(delta, gram, damping=options.damping_or(_DAMPING), dtype=dtype)
    search = _Search(delta.to(dtype), row_fit, min(options.min_per_row, delta.shape[1]))
    found = search.exchange(search.pursue(budget, stages=options.stages), rounds=options.exchanges, tolerance=options.tolerance)
    return never_worse(delta, gram, found.rows, dtype=dtype)


@dataclass(frozen=True, eq=False)
class _State:
    """Places with their best values, and what they leave."""

    rows: SparseRows
    losses: Tensor | None  # (nnz,); where an exchange may follow
    slope: Tensor  # (D − F) G, (out, in)
    error: float


class _Search:
    """One layer's search; D and G are fixed."""

    def __init__(self, delta: Tensor, row_fit: RowFit, minimum: int) -> None:
        self.delta = delta
        self.row_fit = row_fit
        self.minimum = minimum
        self.diagonal = row_fit.gram.diagonal()
        # the slope only ranks candidates and compares errors; the values come from the row fit
        self.gram = SplitMatrix(row_fit.gram)

    def pursue(self, budget: int, *, stages: int) -> _State:
        """Fill the budget, a share a stage."""
        mask = torch.zeros(self.delta.shape, dtype=torch.bool, device=self.delta.device)
        state = self._fitted(mask)
        rows = mask.shape[0]
        # the rows' minimum one by one: two that are chosen together may be two names for one thing
        totals = [rows * each for each in range(1, self.minimum + 1)]
        totals += [total for stage in range(1, stages + 1) if (total := budget * stage // stages) > rows * self.minimum]
        for total in totals:
            missing = total - state.rows.columns.numel()
            mask = mask | self._joining(state, mask, missing, least=min(self.minimum, total // rows))
            state = self._fitted(mask, with_losses=total == budget)
        return state

    def exchange(self, state: _State, *, rounds: int, tolerance: float) -> _State:
        """Exchange the least useful places for the most promising ones until that gains too little."""
        share = _FIRST_SHARE
        for _ in range(rounds):
            tried = self._exchanged(state, max(1, int(share * state.rows.columns.numel())))
            gained = tried.error < state.error * (1 - tolerance)
            if tried.error < state.error:
                state = tried
            if not gained:
                share /= 3
                if share < _LAST_SHARE:
                    break
        return state

    def _exchanged(self, state: _State, count: int) -> _State:
        assert state.losses is not None, "asked for where an exchange may follow"
        kept = _mask(state.rows, ~_largest(-state.losses, count))
        return self._fitted(kept | self._joining(state, kept, count, least=self.minimum), with_losses=True)

    def _joining(self, state: _State, kept: Tensor, count: int, *, least: int) -> Tensor:
        """The `count` places with the largest gains beside those that are kept, after every row has its least."""
        # the slope is zero at the places of a state, so one that has just left comes back only where nothing else is free
        gains = state.slope.square().div_(self.diagonal).masked_fill_(_mask(state.rows), 0.0).masked_fill_(kept, -1.0)
        lacking = (least - kept.sum(dim=1)).clamp_min(0)
        forced = int(lacking.sum())
        if not forced:
            return _largest(gains, count)
        first = select(gains, lacking)
        return first | _largest(gains.masked_fill_(first, -1.0), count - forced)

    def _fitted(self, mask: Tensor, *, with_losses: bool = False) -> _State:
        rows = SparseRows.from_mask(torch.zeros_like(self.delta), mask)
        values, losses = self.row_fit.fit(rows, with_losses=with_losses)
        rows = rows.with_values(values)
        rest = self.delta - rows.dense(self.delta.dtype)
        slope = self.gram.multiply(rest)
        return _State(rows, losses, slope, float((slope * rest).sum(dtype=torch.float64)))


def _mask(rows: SparseRows, kept: Tensor | bool = True) -> Tensor:
    """The places (out, in) of all entries, or of those for which kept (nnz,) is set."""
    flat = torch.zeros(rows.shape[0] * rows.shape[1], dtype=torch.bool, device=rows.columns.device)
    flat[rows.flat_index()] = kept
    return flat.view(rows.shape)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` highest scores of all; ties go to the lower index on every device."""
    flat = scores.reshape(-1)
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    threshold = flat.topk(count, sorted=False).values.min()
    chosen = flat > threshold
    ties = (flat == threshold).nonzero()[:, 0]
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.view(scores.shape)
