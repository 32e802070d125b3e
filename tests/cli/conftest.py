"""A runner that runs nothing: commands are tested without torch, models or minutes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@dataclass(frozen=True)
class FakeOptions:
    force: tuple[str, ...] = ()
    deep_verify: bool = False
    resume: bool = True
    gpus: int | None = None


@dataclass(frozen=True)
class FakeStage:
    fresh: bool = False
    path: Path = Path()


@dataclass
class FakeResult:
    run: Path
    stages: dict[str, FakeStage] = field(default_factory=lambda: {"quantize": FakeStage()})
    table: list[dict[str, object]] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        return {
            "run": str(self.run),
            "stages": {name: {"fresh": s.fresh} for name, s in self.stages.items()},
            "table": self.table,
        }


@dataclass
class FakeRunner:
    """Stands in for qwha_cli.stages.runner; remembers its calls and may raise or talk to the events."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    reports: list[Path] = field(default_factory=list)
    error: BaseException | None = None
    tell: Callable[[Any], None] | None = None
    fresh: bool = False
    table: list[dict[str, object]] = field(default_factory=list)
    init: Path | None = None

    def run_stages(
        self, recipe: Any, *, until: str | None, events: Any, root: Path | None = None, options: Any = None
    ) -> FakeResult:
        self.calls.append({"recipe": recipe, "until": until, "options": options})
        if self.tell is not None:
            self.tell(events)
        if self.error is not None:
            raise self.error
        stages = {"quantize": FakeStage(self.fresh)} | ({"init": FakeStage(self.fresh, self.init)} if self.init else {})
        return FakeResult(Path(recipe.output) / recipe.name, stages, self.table)

    def write_report(self, run: Path) -> Any:
        self.reports.append(run)
        module = ModuleType("paths")
        module.markdown, module.html = run / "report.md", run / "report.html"  # type: ignore[attr-defined]
        return module

    @property
    def recipe(self) -> Any:
        return self.calls[-1]["recipe"]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRunner:
    """Replace the runner and the report writer, and work in an empty folder."""
    fake = FakeRunner()
    stages = ModuleType("qwha_cli.stages.runner")
    stages.run_stages, stages.RunOptions = fake.run_stages, FakeOptions  # type: ignore[attr-defined]
    render = ModuleType("qwha_cli.report.render")
    render.write_report = fake.write_report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stages.__name__, stages)
    monkeypatch.setitem(sys.modules, render.__name__, render)
    monkeypatch.chdir(tmp_path)
    return fake
