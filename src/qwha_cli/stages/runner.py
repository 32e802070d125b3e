"""Runs the stages a command needs: skips what is fresh, runs what is missing or stale, publishes what comes out.

Only this file knows of keys, locks, drafts and archives. Of several processes each comes here; the first decides what runs, makes
each artifact and says when it is there. The others wait, except in training, which all share.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
from qwha_cli.stages.agreement import Agreement
from qwha_cli.stages.context import StageContext
from qwha_cli.stages.device import device_of_rank, devices_of_stage
from qwha_cli.stages.events import Events
from qwha_cli.stages.interruption import Interruption, interruptible
from qwha_cli.stages.plan import PlannedStage, ancestors, plan
from qwha_cli.stages.ranks import Ranks, check_launcher, check_split, own_ranks
from qwha_cli.stages.spread import release
from qwha_cli.stages.table import build_table
from qwha_cli.training.precision import choose_precision

_RUN: Mapping[str, Callable[[StageContext], dict[str, object]]] = {
    "quantize": quantize_stage.run,
    "init": init_stage.run,
    "train": train_stage.run,
    "eval": eval_stage.run,
    "merge": merge_stage.run,
}

_FRESH, _STALE, _DONE = "fresh", "stale", "done"
# a shared file system may show another machine's files a minute late
_VISIBLE_S = 90.0


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what: nothing here changes a result.

    Attributes:
        force: Stages to run again although they are fresh.
        resume: Whether unfinished stages continue behind what they kept, or start over.
        deep_verify: Check input artifacts by sha256, not only by size.
        gpus: GPUs that quantize and init share their matrices out to; None for those of all processes on this machine.
    """

    force: tuple[str, ...] = ()
    resume: bool = True
    deep_verify: bool = False
    gpus: int | None = None


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
    check_launcher()
    ranks = own_ranks()
    if "train" in wanted:
        check_split(recipe.train.keep, ranks)
    device = device_of_rank(recipe.model.device, ranks)
    if "train" in wanted:
        _check_precision(recipe, planned["train"], device)
    devices = devices_of_stage(device, gpus=options.gpus, ranks=ranks)
    result = RunResult(run=root)
    with contextlib.ExitStack() as stack:
        if ranks.first:
            stack.enter_context(locked(root))
            write_atomically(root / "recipe.resolved.yaml", recipe.to_yaml())
        interruption = stack.enter_context(interruptible(ranks))
        session = _Session(recipe, planned, devices, events, interruption, options, ranks, Agreement(ranks))
        for name in wanted:
            if ranks.first:
                result.stages[name] = _bring_up_to_date(session, planned[name])
                session.agreement.tell(name, _DONE)
            else:
                _follow(session, planned[name])
    if ranks.first:
        result.table.extend(build_table(root, recipe))
    return result


def _check_precision(recipe: Recipe, stage: PlannedStage, device: torch.device) -> None:
    """Refuse an arithmetic that the device does not have before hours of other stages, unless the training is done."""
    manifest = own_manifest(stage.folder)
    if manifest is None or manifest.key != stage.key:
        choose_precision(recipe.train.precision, device=device)


@dataclass(frozen=True)
class _Session:
    """What the stages of one call share."""

    recipe: Recipe
    planned: Mapping[str, PlannedStage]
    devices: tuple[torch.device, ...]
    events: Events
    interruption: Interruption
    options: RunOptions
    ranks: Ranks
    agreement: Agreement

    def work(self, stage: PlannedStage) -> Path:
        """The folder that survives a kill."""
        return stage.folder.parent / ".work" / f"{stage.folder.name}-{stage.key[:12]}"

    def context(self, stage: PlannedStage, draft: Path) -> StageContext:
        """What the stage is given."""
        return StageContext(
            recipe=self.recipe,
            draft=draft,
            work=self.work(stage),
            inputs={name: self.planned[name].folder for name in stage.inputs},
            manifests=_input_manifests(stage, self.planned),
            key=stage.key,
            device=self.devices[0],
            devices=self.devices,
            events=self.events,
            interrupted=self.interruption,
            stage=stage.stage,
            rank=self.ranks.rank,
        )

    def run(self, stage: PlannedStage, context: StageContext) -> dict[str, object]:
        """Run a stage's function, letting training finish its step when the user stops it."""
        self.interruption.graceful = stage.stage == "train"
        results = _RUN[stage.stage](context)
        self.interruption.graceful = False
        release(self.devices)
        return results


def _bring_up_to_date(session: _Session, stage: PlannedStage) -> StageResult:
    options, events = session.options, session.events
    fresh = None if stage.stage in options.force else _fresh(stage, deep=options.deep_verify)
    if fresh is not None:
        session.agreement.tell(f"{stage.stage} is", _FRESH)
        events.stage_fresh(stage.stage, stage.folder)
        return StageResult(stage.folder, fresh.seconds, True, fresh.results, fresh.notes)
    events.stage_started(stage.stage, _reason(stage))
    work = session.work(stage)
    if not options.resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    session.agreement.tell(f"{stage.stage} is", _STALE)
    started = time.monotonic()
    with drafting(stage.folder) as draft, _explained_memory(stage.stage):
        context = session.context(stage, draft)
        results = session.run(stage, context)
        seconds = time.monotonic() - started
        manifest = Manifest(
            stage=stage.stage,
            key=stage.key,
            settings=stage.settings,
            inputs=stage.inputs,
            results=results,
            notes=tuple(context.notes),
            environment=describe_environment(device=str(session.devices[0])),
            seconds=seconds,
        )
        manifest = publish(draft, stage.folder, manifest=manifest)
    shutil.rmtree(work, ignore_errors=True)
    events.stage_finished(stage.stage, seconds, results)
    return StageResult(stage.folder, seconds, False, results, manifest.notes)


def _follow(session: _Session, stage: PlannedStage) -> None:
    """Share in the training if there is one, and wait for everything else."""
    if stage.stage == "train" and session.agreement.hear("train is") == _STALE:
        # the inputs were seen here already: see below
        with tempfile.TemporaryDirectory(prefix="qwha-") as draft, _explained_memory(stage.stage):
            session.run(stage, session.context(stage, Path(draft)))
    session.agreement.hear(stage.stage)
    end = time.monotonic() + _VISIBLE_S
    while (manifest := own_manifest(stage.folder)) is None or manifest.key != stage.key:
        if time.monotonic() > end:
            raise ArtifactError(
                f"the first process has finished {stage.stage}, but it is not to be seen from this one",
                where=str(stage.folder),
                remedy="start all machines in one folder that they share, or give them one by output=FOLDER",
            )
        time.sleep(0.2)


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
