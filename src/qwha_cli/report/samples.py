"""Answers side by side: the sample files of an evaluation, matched by question across the rows of the table.

A file is named ROW-MEASUREMENT.jsonl. The samples shown are the first of the file, not chosen ones; a question that only one row
was asked is shown with that row's answer alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwha_cli.errors import ArtifactError
from qwha_cli.report.table import ROW_STAGES

# What the writers call the parts of a sample: our own exact match first, then lm-eval's records.
_QUESTION = ("prompt", "question", "doc", "arguments")
_EXPECTED = ("expected", "target", "answer")
_OUTPUT = ("response", "filtered_resps", "resps")
_CORRECT = ("correct", "exact_match", "acc")


@dataclass(frozen=True)
class Answer:
    """What one row of the table said, what was read out of it as its answer, and whether that is right; None where not known."""

    row: str
    text: str
    correct: bool | None
    found: str | None = None


@dataclass(frozen=True)
class Sample:
    """One question, what was expected, and every row's answer in the order of the table."""

    measurement: str
    question: str
    expected: str
    answers: tuple[Answer, ...]


def read_samples(folder: Path) -> list[Sample]:
    """Read every sample file of an evaluation.

    Args:
        folder: `4-eval/samples`; it need not exist.

    Returns:
        Samples by measurement, then in the order of the files.

    Raises:
        ArtifactError: A line of a file is no JSON.
    """
    merged: dict[tuple[str, str], Sample] = {}
    for row in ROW_STAGES:
        for path in sorted(folder.glob(f"{row}-*.jsonl")):
            measurement = path.stem.removeprefix(f"{row}-")
            for record in _records(path):
                question = _text(record, _QUESTION)
                if not _written(record):
                    continue
                answer = Answer(row, _text(record, _OUTPUT), _judged(record), _text(record, ("found",)) or None)
                key = (measurement, question)
                before = merged.get(key)
                expected = before.expected if before else _text(record, _EXPECTED)
                earlier = before.answers if before else ()
                if all(a.row != row for a in earlier):  # a question asked twice keeps its first answer
                    merged[key] = Sample(measurement, question, expected, (*earlier, answer))
    return sorted(merged.values(), key=lambda sample: sample.measurement)


def _records(path: Path) -> list[Mapping[str, object]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [dict(json.loads(line)) for line in lines if line.strip()]
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"cannot be read: {error}", where=str(path), remedy="run the eval stage again") from error


def _written(record: Mapping[str, object]) -> bool:
    """Whether the model wrote an answer; in tasks of multiple choice it only gave likelihoods, which nobody can read."""
    value = next((record[name] for name in _OUTPUT if name in record), None)
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str)


def _text(record: Mapping[str, object], names: tuple[str, ...]) -> str:
    """Return the first of several fields that is there, as text."""
    for name in names:
        value = record.get(name)
        while isinstance(value, list | tuple) and value:  # lm-eval nests its responses
            value = value[0]
        if isinstance(value, Mapping):
            value = next((value[k] for k in _QUESTION if k in value), json.dumps(value, ensure_ascii=False))
        if value is not None and value != []:
            return str(value).strip()
    return ""


def _judged(record: Mapping[str, object]) -> bool | None:
    for name in _CORRECT:
        value = record.get(name)
        if isinstance(value, bool | int | float):
            return bool(value)
    return None
