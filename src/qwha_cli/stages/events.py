"""What a run tells whoever watches it: the command line draws it, tests record it, a library user may ignore it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from qwha_cli.training.metrics import ProgressSink


class Events(Protocol):
    """The watcher of a run."""

    def stage_started(self, name: str, reason: str) -> None:
        """A stage begins; the reason is "missing" or what changed."""
        ...

    def stage_fresh(self, name: str, path: Path) -> None:
        """A stage has nothing to do: its artifact answers this recipe."""
        ...

    def stage_finished(self, name: str, seconds: float, results: Mapping[str, object]) -> None:
        """A stage's artifact is published."""
        ...

    def progress(self, stage: str, done: int, total: int, text: str) -> None:
        """`done` of `total` units of a stage are through; `text` says what is being worked on."""
        ...

    def note(self, stage: str, text: str) -> None:
        """A fallback or a choice that a person should know of; it is also kept in the manifest."""
        ...

    def layers(self, stage: str, records: list[dict[str, object]]) -> None:
        """The per-layer measurements of a finished quantize or init stage."""
        ...

    def training(self) -> ProgressSink:
        """Return the sink that the training loop reports to."""
        ...


class SilentTraining:
    """A training sink that ignores everything."""

    def start(self, total_steps: int) -> None:
        """Ignore the start."""

    def step(self, metrics: object) -> None:
        """Ignore a step."""

    def validation(self, step: int, loss: float) -> None:
        """Ignore a validation."""

    def note(self, text: str) -> None:
        """Ignore a note."""


class SilentEvents:
    """A watcher that ignores everything."""

    def stage_started(self, name: str, reason: str) -> None:
        """Ignore a start."""

    def stage_fresh(self, name: str, path: Path) -> None:
        """Ignore a fresh stage."""

    def stage_finished(self, name: str, seconds: float, results: Mapping[str, object]) -> None:
        """Ignore an end."""

    def progress(self, stage: str, done: int, total: int, text: str) -> None:
        """Ignore progress."""

    def note(self, stage: str, text: str) -> None:
        """Ignore a note."""

    def layers(self, stage: str, records: list[dict[str, object]]) -> None:
        """Ignore measurements."""

    def training(self) -> ProgressSink:
        """Return a sink that ignores everything."""
        return SilentTraining()
