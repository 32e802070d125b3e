"""One budget over all layers: every place of every layer competes with all others by what it would take off the loss.

A place (i, j) of F, alone, lowers its layer's output error by P_ij² / G_jj with P = (W − Q̂) H G, and the loss by about half of
that times the layer's mean squared gradient. A layer gets as many entries as it has places above one threshold, which is the one
whose counts add up to the budget (reverse water-filling). Layers hand in a histogram of their gains, so that no two of them need
be in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from qwha_cli.errors import NumericsError

BINS_PER_OCTAVE = 4
# of the Gram matrix that gains are measured with, as in the pursuit
GAIN_DAMPING = 0.1


@dataclass(frozen=True)
class Gains:
    """How many places of a layer have which gain: a histogram over log2, four bins an octave.

    Attributes:
        first: Bin of the first count: it holds gains from 2^(first / 4) up to, but not with, 2^((first + 1) / 4).
        counts: Places in that bin and the following ones. Places without any gain are in none.
    """

    first: int
    counts: Sequence[int]

    def to_json(self) -> dict[str, object]:
        """The form it has in layers.jsonl."""
        return {"first": self.first, "counts": list(self.counts)}

    @classmethod
    def from_json(cls, fields: Mapping[str, object]) -> Gains:
        """Undo `to_json`."""
        return cls(cast(int, fields["first"]), cast("list[int]", fields["counts"]))

    def above(self, threshold: float) -> float:
        """How many places have a log2 gain above the threshold; within a bin they count as evenly spread."""
        if threshold == math.inf:
            return 0.0
        place = threshold * BINS_PER_OCTAVE - self.first
        whole = math.floor(place)
        if whole < 0:
            return float(sum(self.counts))
        if whole >= len(self.counts):
            return 0.0
        return self.counts[whole] * (1 - (place - whole)) + sum(self.counts[whole + 1 :])


def measure_gains(delta: Tensor, damped: Tensor) -> Gains:
    """The gains of all places of a layer.

    Args:
        delta: (W − Q̂) H, floating (out, in).
        damped: Gram matrix of the inputs in the Hadamard basis, damped, (in, in).

    Returns:
        Their histogram.
    """
    slope = delta @ damped
    gains = slope.square_().div_(damped.diagonal()).flatten()
    bins = (gains[gains > 0].log2_() * BINS_PER_OCTAVE).floor_().long()
    if not len(bins):
        return Gains(0, ())
    first = int(bins.min())
    return Gains(first, torch.bincount(bins - first).tolist())


def share_globally(
    gains: Mapping[str, Gains],
    weights: Mapping[str, float],
    *,
    total: int,
    least: Mapping[str, int],
    most: Mapping[str, int],
) -> dict[str, int]:
    """Share a budget among layers by their gains.

    Args:
        gains: Of each layer.
        weights: What a unit of each layer's squared output error costs.
        total: Entries to share.
        least: Entries of each layer at least.
        most: Entries of each layer at most.

    Returns:
        Layer to entries, whose sum is `total`; ties go to the layer that comes first.

    Raises:
        NumericsError: The total does not lie between the sums of least and most.
    """
    names = list(gains)
    if not sum(least[n] for n in names) <= total <= sum(most[n] for n in names):
        raise NumericsError(
            f"a budget of {total} entries does not fit {len(names)} layers",
            where="init.budget",
            remedy="raise or lower adapter.rank, or lower init.min_per_row",
        )
    shifts = {name: math.log2(weights[name]) if weights[name] > 0 else -math.inf for name in names}

    def quotas(threshold: float) -> dict[str, float]:
        return {n: min(max(gains[n].above(threshold - shifts[n]), float(least[n])), float(most[n])) for n in names}

    low, high = -1024.0, 1024.0
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(quotas(middle).values()) >= total else (low, middle)
    return _rounded(quotas(low), total=total, least=least, most=most)


def _rounded(quotas: Mapping[str, float], *, total: int, least: Mapping[str, int], most: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers that add up: rounded down, then one more for the largest remainders, then whoever has room.

    There is much to hand out at the end only where layers have fewer places with a gain than entries to take.
    """
    found = {name: math.floor(quota) for name, quota in quotas.items()}
    names = sorted(found, key=lambda name: found[name] - quotas[name])
    missing = total - sum(found.values())
    while missing:
        for name in names:
            step = max(1, missing // len(names)) if missing > 0 else -1
            step = min(step, most[name] - found[name]) if missing > 0 else max(step, least[name] - found[name])
            found[name] += step
            missing -= step
            if not missing:
                break
    return found
