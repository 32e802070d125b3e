"""Runs the stages a command needs: skips what is fresh, runs what is missing or stale, publishes what comes out.

Only this file knows of keys, locks, drafts and archives. Under torchrun every rank comes here; rank 0 makes each artifact and the
others wait for it, except in training, which they share.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

from qwha_cli.artifacts.environment import describe_environment
from qwha_cli.artifacts.manifest import Manifest, own_manifest, read_manifest
from qwha_cli.artifacts.store import bring_back, drafting, locked, missing_files, publish, verify, write_atomically
from qwha_cli.errors import ArtifactError, ResourceError
from qwha_cli.recipe.schema import Recipe
from qwha_cli.stages import eval as eval_stage
from qwha_cli.stages import init as init_stage
from qwha_cli.stages import merge as merge_stage
from qwha_cli.stages import quantize as quantize_stage
from qwha_cli.stages import train as train_stage
from qwha_cli.stages.context import StageContext
from qwha_cli.stages.device import resolve_device
from qwha_cli.stages.events import Events
from qwha_cli.stages.plan import PlannedStage, ancestors, plan
from qwha_cli.stages.table import build_table

_RUN: Mapping[str, Callable[[StageContext], dict[str, object]]] = {
    "quantize": quantize_stage.run,
    "init": init_stage.run,
    "train": train_stage.run,
    "eval": eval_stage.run,
    "merge": merge_stage.run,
}


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what: nothing here changes a result.

    Attributes:
        force: Stages to run again although they are fresh.
        resume: Whether unfinished stages continue behind what they kept, or start over.
        deep_verify: Check input artifacts by sha256, not only by size.
    """

    force: tuple[str, ...] = ()
    resume: bool = True
    deep_verify: bool = False


@dataclass(frozen=True)
class StageResult:
    """One stage of a run, as it stands."""

    path: Path
    seconds: float
    fresh: bool
    results: Mapping[str, object]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """What a run did and what its table says."""

    run: Path
    stages: dict[str, StageResult] = field(default_factory=dict)
    table: list[dict[str, object]] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """`{run, stages: {name: {path, seconds, fresh, results, notes}}, table: [{row, ...}]}`."""
        stages = {
            name: {
                "path": str(stage.path),
                "seconds": round(stage.seconds, 3),
                "fresh": stage.fresh,
                "results": dict(stage.results),
                "notes": list(stage.notes),
            }
            for name, stage in self.stages.items()
        }
        return {"run": str(self.run), "stages": stages, "table": self.table}


def run_folder(recipe: Recipe) -> Path:
    """Return the folder of a recipe's run: `output/name`."""
    return Path(recipe.output).expanduser() / recipe.name


def run_stages(
    recipe: Recipe, *, until: str | None, events: Events, root: Path | None = None, options: RunOptions | None = None
) -> RunResult:
    """Bring every stage up to `until` (None: all) up to date.

    Args:
        recipe: What to do.
        until: The last stage wanted; its inputs are made first where they are missing or stale.
        events: Whom to tell.
        root: The run's folder; `output/name` by default.
        options: How to run.

    Returns:
        Every stage touched, and the table of rows known so far.

    Raises:
        QwhaError: A stage failed; artifacts finished before it stay.
    """
    root = root or run_folder(recipe)
    options = options or RunOptions()
    planned = plan(recipe, root=root)
    wanted = list(planned) if until is None else ancestors(planned, until)
    rank = int(os.environ.get("RANK", "0"))
    device = resolve_device(recipe.model.device)
    result = RunResult(run=root)
    with contextlib.ExitStack() as stack:
        if rank == 0:
            stack.enter_context(locked(root))
            write_atomically(root / "recipe.resolved.yaml", recipe.to_yaml())
        interruption = stack.enter_context(_interruptible())
        for name in wanted:
            stage = planned[name]
            if rank == 0 or name == "train":
                result.stages[name] = _bring_up_to_date(stage, recipe, planned, device, events, interruption, options, rank)
            else:
                _wait_for(stage)
    if rank == 0:
        result.table.extend(build_table(root, recipe))
    return result


def _bring_up_to_date(
    stage: PlannedStage,
    recipe: Recipe,
    planned: Mapping[str, PlannedStage],
    device: torch.device,
    events: Events,
    interruption: _Interruption,
    options: RunOptions,
    rank: int,
) -> StageResult:
    fresh = None if stage.stage in options.force else _fresh(stage, deep=options.deep_verify)
    if fresh is not None:
        if rank == 0:
            events.stage_fresh(stage.stage, stage.folder)
        return StageResult(stage.folder, fresh.seconds, True, fresh.results, fresh.notes)
    if rank == 0:
        events.stage_started(stage.stage, _reason(stage))
    work = stage.folder.parent / ".work" / f"{stage.folder.name}-{stage.key[:12]}"
    if rank == 0 and not options.resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with drafting(stage.folder) if rank == 0 else _no_draft() as draft, _explained_memory(stage.stage):
        context = StageContext(
            recipe=recipe,
            draft=draft,
            work=work,
            inputs={name: planned[name].folder for name in stage.inputs},
            manifests=_input_manifests(stage, planned),
            key=stage.key,
            device=device,
            events=events,
            interrupted=interruption,
            stage=stage.stage,
            rank=rank,
        )
        interruption.graceful = stage.stage == "train"
        results = _RUN[stage.stage](context)
        interruption.graceful = False
        seconds = time.monotonic() - started
        if rank != 0:
            _wait_for(stage)
            return StageResult(stage.folder, seconds, False, results)
        manifest = Manifest(
            stage=stage.stage,
            key=stage.key,
            settings=stage.settings,
            inputs=stage.inputs,
            results=results,
            notes=tuple(context.notes),
            environment=describe_environment(device=str(device)),
            seconds=seconds,
        )
        manifest = publish(draft, stage.folder, manifest=manifest)
    shutil.rmtree(work, ignore_errors=True)
    events.stage_finished(stage.stage, seconds, results)
    return StageResult(stage.folder, seconds, False, results, manifest.notes)


def _fresh(stage: PlannedStage, *, deep: bool) -> Manifest | None:
    """Return the manifest of an artifact that answers this plan, if there is one here or in the archive, and it is sound."""
    try:
        manifest = read_manifest(stage.folder)
        if (manifest is None or manifest.key != stage.key) and not bring_back(stage.folder, stage.key):
            return None
        return verify(stage.folder, deep=deep)
    except ArtifactError:
        return None  # damaged: _reason says how, and the folder is set aside when the new one is published


def _reason(stage: PlannedStage) -> str:
    try:
        manifest = read_manifest(stage.folder)
    except ArtifactError as error:
        return f"damaged: {error.message}"
    if manifest is None:
        return "missing"
    if manifest.key == stage.key:
        gone = missing_files(stage.folder, manifest)
        return f"damaged: {', '.join(gone[:3])}" if gone else "asked for again, or changed on disk"
    changed = _differences(manifest.settings, stage.settings)
    if changed:
        return "changed: " + ", ".join(changed[:6]) + (" ..." if len(changed) > 6 else "")
    parents = [name for name, key in stage.inputs.items() if manifest.inputs.get(name) != key]
    return "new input: " + ", ".join(parents)


def _differences(old: object, new: object, prefix: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: list[str] = []
        for key in sorted({*old, *new}):
            found += _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    same = list(old) == list(new) if isinstance(old, list | tuple) and isinstance(new, list | tuple) else old == new
    return [] if same else [prefix]


def _input_manifests(stage: PlannedStage, planned: Mapping[str, PlannedStage]) -> dict[str, Manifest]:
    found: dict[str, Manifest] = {}
    for name in stage.inputs:
        manifest = read_manifest(planned[name].folder)
        if manifest is None:
            raise ArtifactError("an input artifact disappeared", where=str(planned[name].folder), remedy="run the command again")
        found[name] = manifest
    return found


def _wait_for(stage: PlannedStage) -> None:
    """Wait until rank 0 has published an artifact; torchrun ends this process if rank 0 fails."""
    while (manifest := own_manifest(stage.folder)) is None or manifest.key != stage.key:
        time.sleep(0.2)


@contextlib.contextmanager
def _no_draft() -> Generator[Path]:
    """Yield a folder for a rank that publishes nothing."""
    with tempfile.TemporaryDirectory(prefix="qwha-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _explained_memory(stage: str) -> Generator[None]:
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        place = "the GPU" if isinstance(error, torch.cuda.OutOfMemoryError) else "this machine"
        remedies = {
            "quantize": "lower quantize.calibration.batch_size",
            "init": "lower quantize.calibration.batch_size",
            "train": "lower train.batch_size (raise train.accumulation), set train.checkpointing=true, or lower train.max_length",
            "eval": "lower eval.batch_size",
            "merge": "run on a machine that holds the model in 16 bits, or `model.device=cpu`",
        }
        raise ResourceError(
            f"{place} ran out of memory: {str(error).splitlines()[0]}", where=stage, remedy=remedies[stage]
        ) from error


class _Interruption:
    """Whether the user asked to stop (Ctrl-C, or a scheduler's SIGTERM).

    While training runs, the first request only raises this flag: the loop finishes its step, saves, and leaves. A second one, or
    any outside training, raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self.graceful = False

    def __call__(self) -> bool:
        return self.asked

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.asked or not self.graceful:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def _interruptible() -> Generator[_Interruption]:
    interruption = _Interruption()
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # signals belong to the main thread; a library user's thread does without
        return
    previous = [signal.signal(number, interruption.handle) for number in signals]
    try:
        yield interruption
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
