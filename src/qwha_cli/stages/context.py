"""What a stage is given, and what it hands back. Stages hold no bookkeeping: paths, keys and freshness are the runner's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qwha_cli.artifacts.manifest import Manifest
from qwha_cli.recipe.schema import Recipe
from qwha_cli.stages.device import resolve_dtype
from qwha_cli.stages.events import Events


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may use.

    Attributes:
        recipe: The whole recipe; a stage reads its own section and those of its inputs.
        draft: The empty folder to write the artifact into.
        work: A folder that survives a kill and is deleted on success: checkpoints and partial results.
        inputs: Stage name to artifact folder.
        manifests: Stage name to the manifest of that artifact.
        key: The artifact's key, for refusing foreign checkpoints.
        device: Where to compute.
        devices: Where matrices that do not depend on one another may be computed, `device` first.
        events: Whom to tell.
        interrupted: True once the user asked to stop.
        rank: Which of several processes this is; only 0 writes what is published.
    """

    recipe: Recipe
    draft: Path
    work: Path
    inputs: Mapping[str, Path]
    manifests: Mapping[str, Manifest]
    key: str
    device: torch.device
    events: Events
    interrupted: Callable[[], bool]
    stage: str
    devices: tuple[torch.device, ...] = ()
    rank: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the model's unquantized parts."""
        return resolve_dtype(self.recipe.model.dtype, self.device)

    def note(self, text: str) -> None:
        """Tell the watcher of a fallback or choice, and keep it for the manifest; said once."""
        if text not in self.notes:
            self.notes.append(text)
            self.events.note(self.stage, text)

    def progress(self, done: int, total: int, text: str) -> None:
        """Tell the watcher how far the stage is."""
        self.events.progress(self.stage, done, total, text)


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, object]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
