"""The numbers of a training run: one JSON line a step in metrics.jsonl, and whoever watches.

A line is appended and flushed as soon as its step is done, so a killed run loses at most a torn last line. Resuming from a
checkpoint cuts the file back to the checkpoint's step; what follows is written again, equal but for the timing fields.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from qwha_cli.artifacts.store import write_atomically

TIMING_FIELDS = ("tokens_per_s", "wall_s")


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: Counted from 1.
        loss: Mean negative log-likelihood of the step's answer tokens, nats a token, before the update.
        lr: The learning rate used.
        grad_norm: The gradient's 2-norm before clipping.
        tokens: Tokens the model read, prompts included, padding not.
        tokens_per_s: The same by the step's duration.
        wall_s: Seconds of training so far, over all sessions of a resumed run.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    wall_s: float


@dataclass(frozen=True)
class ValidationPoint:
    """The mean negative log-likelihood of the validation set's answer tokens after `step` steps, nats a token."""

    step: int
    validation_loss: float


@dataclass(frozen=True)
class MetricsHistory:
    """Everything a metrics.jsonl holds, in the order of the file."""

    steps: tuple[StepMetrics, ...]
    validation: tuple[ValidationPoint, ...]


class ProgressSink(Protocol):
    """Who watches a training run: a progress bar, a log, a test. Called on the first rank only."""

    def start(self, total_steps: int) -> None:
        """Training begins; steps of an earlier session count as part of the total."""
        ...

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""
        ...

    def validation(self, step: int, loss: float) -> None:
        """The validation set was scored after `step` steps."""
        ...

    def note(self, text: str) -> None:
        """Something a reader of the run should know: a choice made, a fallback, a resumption."""
        ...


class MetricsLog:
    """An append-only metrics.jsonl.

    Args:
        path: The file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entry: StepMetrics | ValidationPoint) -> None:
        """Write one line and hand it to the operating system, so that a SIGKILL cannot take it back."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(entry)) + "\n")

    def cut_after(self, step: int) -> None:
        """Drop every line of a later step, and a torn last line; the rest stays byte for byte."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_atomically(self.path, "".join(line + "\n" for line in kept))

    def sync(self) -> None:
        """Force the lines to the disk: a checkpoint must never be newer than its metrics."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def read_metrics(path: Path) -> MetricsHistory:
    """Read a metrics.jsonl; an absent file is an empty history.

    Args:
        path: The file a `MetricsLog` wrote.
    """
    steps: list[StepMetrics] = []
    validation: list[ValidationPoint] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        fields = json.loads(line)
        if "validation_loss" in fields:
            validation.append(ValidationPoint(**fields))
        else:
            steps.append(StepMetrics(**fields))
    return MetricsHistory(steps=tuple(steps), validation=tuple(validation))


def _step_of(line: str) -> float:
    # A line without its end was being written when the process died: later than any checkpoint.
    try:
        return float(cast("dict[str, float]", json.loads(line))["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
