"""The headline table: one row for each state of the model, from the manifests' results, the scores and the sizes on disk.

A number that was not measured is None, never zero. Sizes are 10^6 bytes of safetensors; bits per weight count everything stored
for the quantized linears (codes, scales, zeros, and the adapter's values and places) over their number of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwha_cli.artifacts.manifest import Manifest

# Row name to the stage whose artifact it shows; the order is the table's.
ROW_STAGES: Mapping[str, str] = {"16-bit": "quantize", "base": "quantize", "init": "init", "trained": "train", "merged": "merge"}


@dataclass(frozen=True)
class TaskResult:
    """One task's score: a fraction with its standard error, over n examples; `filter` took the answer out of the output."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int | None
    shots: int | None
    version: str

    @property
    def measure(self) -> str:
        """The metric, with the filter where there is a choice of filters."""
        return self.metric if self.filter == "none" else f"{self.metric}, {self.filter}"


@dataclass(frozen=True)
class TableRow:
    """One state of the model. Fractions for exact match and layer error; seconds are those of the stage that made the state."""

    row: str
    perplexity_answers: float | None = None
    perplexity_text: float | None = None
    exact_match: float | None = None
    exact_match_stderr: float | None = None
    n: int | None = None
    layer_error: float | None = None
    bits_per_weight: float | None = None
    megabytes: float | None = None
    seconds: float | None = None
    tasks: tuple[TaskResult, ...] = ()


def table_rows(
    folders: Mapping[str, Path], manifests: Mapping[str, Manifest], *, scores: Mapping[str, Mapping[str, object]]
) -> list[TableRow]:
    """Return the rows whose artifacts are there.

    Args:
        folders: Stage name to artifact folder.
        manifests: Stage name to manifest, for the same stages.
        scores: Row name to its record in scores.json.
    """
    rows: list[TableRow] = []
    for row, stage in ROW_STAGES.items():
        if stage not in manifests:
            continue
        measured = scores.get(row, {})
        stored = _stored(row, folders, manifests)
        rows.append(
            TableRow(
                row=row,
                perplexity_answers=number(measured.get("perplexity_answers")),
                perplexity_text=number(measured.get("perplexity_text")),
                exact_match=number(measured.get("exact_match")),
                exact_match_stderr=number(measured.get("exact_match_stderr")),
                n=whole(measured.get("n")),
                layer_error=_layer_error(row, manifests),
                bits_per_weight=stored[0],
                megabytes=stored[1],
                seconds=None if row == "16-bit" else manifests[stage].seconds,
                tasks=tuple(_tasks(measured)),
            )
        )
    return rows


def number(value: object) -> float | None:
    """Return a measured value as a float, or None where it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def whole(value: object) -> int | None:
    """Return a count as an int, or None where it is none."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def weights_megabytes(folder: Path) -> float:
    """Return the size of a folder's safetensors in MB (10^6 bytes)."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def _layer_error(row: str, manifests: Mapping[str, Manifest]) -> float | None:
    """Mean over layers of the output error relative to the 16-bit layer's output; unknown once training has moved the values."""
    if row == "16-bit":
        return 0.0
    if row in ("base", "init"):
        return number(manifests[ROW_STAGES[row]].results.get("layer_error_mean"))
    return None


def _stored(row: str, folders: Mapping[str, Path], manifests: Mapping[str, Manifest]) -> tuple[float | None, float | None]:
    """Return (bits per weight, megabytes) of a row."""
    base = manifests["quantize"].results if "quantize" in manifests else {}
    if row == "16-bit":
        return 16.0, number(base.get("megabytes_16_bit"))
    if row == "merged":
        bits = 32.0 if manifests["merge"].results.get("into") == "fp32" else 16.0
        return bits, weights_megabytes(folders["merge"])
    bits, weights = number(base.get("bits_per_weight")), number(base.get("weights"))
    size = weights_megabytes(folders["quantize"]) if "quantize" in folders else None
    if row == "base" or bits is None or size is None or not weights:
        return bits, size
    adapter = weights_megabytes(folders[ROW_STAGES[row]])
    return bits + adapter * 8e6 / weights, size + adapter


def _tasks(measured: Mapping[str, object]) -> list[TaskResult]:
    found: list[TaskResult] = []
    for name, scores in measured.items():
        if not name.startswith("task:") or not isinstance(scores, list | tuple):
            continue
        for score in scores:
            value = number(score.get("value")) if isinstance(score, Mapping) else None
            if value is None:
                continue
            found.append(
                TaskResult(
                    task=str(score.get("task", name.removeprefix("task:"))),
                    metric=str(score.get("metric", "")),
                    filter=str(score.get("filter", "none")),
                    value=value,
                    stderr=number(score.get("stderr")),
                    n=whole(score.get("n")),
                    shots=whole(score.get("shots")),
                    version=str(score.get("version", "")),
                )
            )
    return found
