"""What an initialisation won: totals against a zero adapter and against other initializers, and whether training is worth it.

Everything is made from the records of 2-init/layers.jsonl, so that the command line, `--json` and the reports say the same.
The verdict is a rule of thumb with its levels in one place; it predicts from layer errors, only evaluation knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from qwha_cli.report.entries import EntriesHistogram, total_rows_by_entries
from qwha_cli.report.layers import Records, finite_number, layer_grid, worst_layers

Level = Literal["good", "worth", "hardly"]
WORST = 10

# Mean over layers of the error after initialisation, as a share of the outputs. Provisional, from one model: SmolLM2-135M has
# 0.002 at 4 bits before any adapter, and at 2 bits 0.034, 0.027 after init (docs/results/smollm2-135m-gsm8k.md). From there
# training beat the untuned 16-bit model on its own task, but running text kept 3.2 times the perplexity: worth it, with a loss.
# 0.02 lies below that case and 0.06 at twice it; more models may move both.
GOOD_MEAN = 0.02
WORTH_MEAN = 0.06
# The mean hides layers that are lost: what later layers read is spoilt by one that passes on a fifth of noise, however good the
# others are. More than one in twenty such layers count as one level worse. Not fitted to anything yet.
LOST_ERROR = 0.2
MOST_LOST = 0.05

_SAID: Mapping[Level, str] = {
    "good": "a good start",
    "worth": "worth training; expect to lose some against 16 bits",
    "hardly": "hardly worth training: more bits, smaller groups, a larger rank or more calibration text first",
}
_NAMES = {"adaalloc": "AdaAlloc", "cloq": "CLoQ", "loftq": "LoftQ", "svd": "SVD"}


@dataclass(frozen=True)
class Rival:
    """Another initializer with as many bytes a layer.

    Attributes:
        name: As recipes write it.
        layers: Number of layers that it was measured on.
        mean: Its mean error over these layers.
        own_mean: The mean error of the initializer used, over the same layers.
    """

    name: str
    layers: int
    mean: float
    own_mean: float


@dataclass(frozen=True)
class Verdict:
    """Whether a base is worth training on.

    Attributes:
        level: What programs read.
        said: What people read, beginning with a small letter and without a full stop.
        reason: A sentence that says what it was concluded from.
    """

    level: Level
    said: str
    reason: str

    @property
    def sentence(self) -> str:
        """All of it on one line."""
        return f"{self.said}. {self.reason}"


@dataclass(frozen=True)
class Initialisation:
    """What is said about an initialisation; errors are shares of the layers' outputs, means over layers.

    Attributes:
        method: Name of the initializer.
        records: The layers that have an error before and after.
        zero_mean: With a zero adapter.
        mean: After initialisation.
        rivals: Other initializers at the same bytes, in the order they were asked for.
        rows: Rows of all layers by their number of entries; None where the records have no histogram.
    """

    method: str
    records: Records
    zero_mean: float
    mean: float
    rivals: tuple[Rival, ...]
    rows: EntriesHistogram | None

    @property
    def recovered(self) -> float:
        """Share of the mean error that is gone."""
        return recovered(self.zero_mean, self.mean) or 0.0

    @property
    def worse(self) -> int:
        """Number of layers that are worse than with a zero adapter; rounding is no difference."""
        pairs = [(_error(r, "error_zero"), _error(r, "error_after")) for r in self.records]
        return sum(after > before * (1 + 1e-6) for before, after in pairs)

    def verdict(self, form: Callable[[float], str] | None = None) -> Verdict:
        """Say whether this base is worth training on; `form` writes errors, by default as fractions."""
        return verdict([_error(record, "error_after") for record in self.records], form=form or error_text)

    def totals(self) -> str:
        """Return the totals in one line."""
        line = f"mean layer error {error_text(self.zero_mean)} (zero) → {error_text(self.mean)} ({display_name(self.method)})"
        line += f", {100 * self.recovered:.0f} % recovered"
        line += f"; {self.worse} of {len(self.records)} layers worse than with zero" if self.worse else ""
        whole = [f"{display_name(r.name)} at the same bytes {error_text(r.mean)}" for r in self.rivals if self._measured(r)]
        part = [
            f"{display_name(r.name)} {error_text(r.mean)} against {error_text(r.own_mean)}, on {r.layers} layers only"
            for r in self.rivals
            if not self._measured(r)
        ]
        return "; ".join([line, *whole, *part])

    def to_json(self) -> dict[str, object]:
        """Return all of it as one JSON-able object."""
        grid, said = layer_grid(self.records, "error_after"), self.verdict()
        return {
            "method": self.method,
            "layers": len(self.records),
            "layers_worse_than_zero": self.worse,
            "layer_error_zero_mean": self.zero_mean,
            "layer_error_mean": self.mean,
            "error_recovered": self.recovered,
            "compare": {r.name: {"layer_error_mean": r.mean, "own_mean": r.own_mean, "layers": r.layers} for r in self.rivals},
            "verdict": {"level": said.level, "sentence": said.sentence},
            "worst_layers": [dict(record) for record in worst_layers(self.records, "error_after", count=WORST)],
            "heat_map": {"projections": list(grid.projections), "error_after": [list(row) for row in grid.values]},
            "entries_histogram": self.rows.to_json() if self.rows else None,
        }

    def _measured(self, rival: Rival) -> bool:
        return rival.layers == len(self.records)


def initialisation(records: Records, *, method: str) -> Initialisation | None:
    """Sum up an initialisation, or return None where no record has an error before and after.

    Args:
        records: Lines of 2-init/layers.jsonl; `compare`, the errors of other initializers, may be absent.
        method: Name of the initializer.
    """
    kept = [r for r in records if None not in (finite_number(r.get("error_zero")), finite_number(r.get("error_after")))]
    if not kept:
        return None
    return Initialisation(
        method=method,
        records=kept,
        zero_mean=fmean(_error(r, "error_zero") for r in kept),
        mean=fmean(_error(r, "error_after") for r in kept),
        rivals=_rivals(kept),
        rows=total_rows_by_entries(kept),
    )


def verdict(errors: Sequence[float], *, form: Callable[[float], str]) -> Verdict:
    """Say whether a base is worth training on.

    Args:
        errors: Error of each layer after initialisation, as a share of its output; at least one.
        form: How errors are written.
    """
    mean, lost = fmean(errors), sum(error > LOST_ERROR for error in errors)
    good, worth = form(GOOD_MEAN), form(WORTH_MEAN)
    place, size = (
        (0, f"up to {good} is small")
        if mean <= GOOD_MEAN
        else (1, f"above {good} and up to {worth} is middling")
        if mean <= WORTH_MEAN
        else (2, f"above {worth} is large")
    )
    levels: tuple[Level, ...] = ("good", "worth", "hardly")
    level = levels[min(place + (lost > MOST_LOST * len(errors)), 2)]
    reason = f"mean layer error {form(mean)} ({size})"
    if lost:
        reason += f" and from {lost} of {len(errors)} layers that are off by more than {form(LOST_ERROR)}"
    return Verdict(level, _SAID[level], f"Predicted from the {reason}; evaluation decides.")


def recovered(before: float | None, after: float | None) -> float | None:
    """Return the share of an error that is gone; None where there was none, or nobody measured."""
    return None if not before or after is None else 1 - after / before


def display_name(initializer: str) -> str:
    """Return an initializer's name as papers write it."""
    return _NAMES.get(initializer, initializer)


def error_text(error: float) -> str:
    """Return an error with four decimals, or with two digits where those would not show it."""
    return f"{error:.4f}" if error >= 0.001 or error == 0 else f"{error:.2g}"


def _rivals(records: Records) -> tuple[Rival, ...]:
    """Return the initializers that `compare` names; zero is in every record already."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        compare = record.get("compare")
        for name, value in compare.items() if isinstance(compare, Mapping) else ():
            error = finite_number(value)
            if error is not None and name != "zero":
                found.setdefault(str(name), []).append((error, _error(record, "error_after")))
    return tuple(
        Rival(name, len(pairs), fmean(error for error, _ in pairs), fmean(own for _, own in pairs))
        for name, pairs in found.items()
    )


def _error(record: Mapping[str, object], name: str) -> float:
    return finite_number(record[name]) or 0.0
