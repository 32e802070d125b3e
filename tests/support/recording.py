"""A watcher that remembers everything a run told it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwha_cli.training.metrics import ProgressSink, StepMetrics


class RecordingEvents:
    """Implements `Events` and `ProgressSink` and keeps what it is told."""

    def __init__(self) -> None:
        self.started: dict[str, str] = {}
        self.fresh: list[str] = []
        self.finished: dict[str, Mapping[str, object]] = {}
        self.notes: list[str] = []
        self.done: list[tuple[str, int, int]] = []
        self.records: dict[str, list[dict[str, object]]] = {}
        self.steps: list[int] = []

    def stage_started(self, name: str, reason: str) -> None:
        self.started[name] = reason

    def stage_fresh(self, name: str, path: Path) -> None:
        self.fresh.append(name)

    def stage_finished(self, name: str, seconds: float, results: Mapping[str, object]) -> None:
        self.finished[name] = results

    def progress(self, stage: str, done: int, total: int, text: str) -> None:
        self.done.append((stage, done, total))

    def note(self, stage: str, text: str) -> None:
        self.notes.append(f"{stage}: {text}")

    def layers(self, stage: str, records: list[dict[str, object]]) -> None:
        self.records[stage] = records

    def training(self) -> ProgressSink:
        return _Sink(self)


class _Sink:
    def __init__(self, events: RecordingEvents) -> None:
        self.events = events

    def start(self, total_steps: int) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
        self.events.steps.append(metrics.step)

    def validation(self, step: int, loss: float) -> None:
        pass

    def note(self, text: str) -> None:
        self.events.notes.append(f"train: {text}")
