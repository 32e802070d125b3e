"""Gather what a run folder says about itself into one frozen value; everything that draws or writes starts from that value.

Only artifacts are read: manifests, layers.jsonl, metrics.jsonl, scores.json, samples and check.json. A stage whose folder has no
manifest does not exist and is listed as missing. Settings are not compared with a recipe here; only the chain of inputs is: a
stage made from another version of its input is marked stale, because its numbers belong to another table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwha_cli.artifacts.manifest import Manifest, read_manifest
from qwha_cli.errors import ArtifactError
from qwha_cli.report.samples import Sample, read_samples
from qwha_cli.report.table import TableRow, table_rows

STAGE_FOLDERS: Mapping[str, str] = {
    "quantize": "1-quantize",
    "init": "2-init",
    "train": "3-train",
    "eval": "4-eval",
    "merge": "5-merge",
}
RECIPE = "recipe.resolved.yaml"


@dataclass(frozen=True)
class RunReport:
    """Everything a report shows.

    Attributes:
        name: The run's name, which is its folder's.
        run: The folder.
        recipe: The resolved recipe as YAML text; empty if the run has none.
        manifests: Stage name to manifest, for the stages that are there, in order of the stages.
        missing: Names of the stages that are not.
        stale: Stage name to the inputs that have changed since it was made.
        table: One row a state of the model.
        quantized: Records of 1-quantize/layers.jsonl.
        initialised: Records of 2-init/layers.jsonl.
        metrics: Records of 3-train/metrics.jsonl, steps and validations mixed, in order.
        samples: Questions with every row's answer.
        check: Contents of 5-merge/check.json; empty if there is none.
    """

    name: str
    run: Path
    recipe: str
    manifests: Mapping[str, Manifest]
    missing: tuple[str, ...]
    stale: Mapping[str, tuple[str, ...]]
    table: tuple[TableRow, ...]
    quantized: tuple[Mapping[str, object], ...]
    initialised: tuple[Mapping[str, object], ...]
    metrics: tuple[Mapping[str, object], ...]
    samples: tuple[Sample, ...]
    check: Mapping[str, object]

    def folder(self, stage: str) -> Path:
        """Return a stage's folder, whether it is there or not."""
        return self.run / STAGE_FOLDERS[stage]

    def notes(self) -> list[tuple[str, str]]:
        """Return (stage, note) for every fallback or choice that a stage recorded."""
        return [(stage, note) for stage, manifest in self.manifests.items() for note in manifest.notes]


def collect(run: Path) -> RunReport:
    """Read a run folder.

    Args:
        run: `runs/NAME`.

    Raises:
        ArtifactError: The folder holds no run, or a file in it cannot be read.
    """
    manifests: dict[str, Manifest] = {}
    for stage, folder in STAGE_FOLDERS.items():
        manifest = read_manifest(run / folder)
        if manifest is not None:
            manifests[stage] = manifest
    recipe = run / RECIPE
    if not manifests and not recipe.is_file():
        remedy = "give the folder of a run, such as runs/NAME; `qwha run RECIPE` makes one"
        raise ArtifactError("no run here", where=str(run), remedy=remedy)
    folders = {stage: run / STAGE_FOLDERS[stage] for stage in manifests}
    scores = read_scores(folders["eval"]) if "eval" in folders else {}
    return RunReport(
        name=run.resolve().name,
        run=run,
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        manifests=manifests,
        missing=tuple(stage for stage in STAGE_FOLDERS if stage not in manifests),
        stale=stale_stages(manifests),
        table=tuple(table_rows(folders, manifests, scores=scores)),
        quantized=_lines(folders, "quantize", "layers.jsonl"),
        initialised=_lines(folders, "init", "layers.jsonl"),
        metrics=_lines(folders, "train", "metrics.jsonl"),
        samples=tuple(read_samples(folders["eval"] / "samples")) if "eval" in folders else (),
        check=_check(folders),
    )


def stale_stages(manifests: Mapping[str, Manifest]) -> dict[str, tuple[str, ...]]:
    """Return, for each stage made from inputs that are no longer the ones present, the names of those inputs."""
    found: dict[str, tuple[str, ...]] = {}
    # What comes after a stale stage is stale too; repeated, because evaluation may come before or after the merge.
    for _ in manifests:
        for stage, manifest in manifests.items():
            changed = [n for n, key in manifest.inputs.items() if n in found or (n in manifests and manifests[n].key != key)]
            if changed:
                found[stage] = tuple(changed)
    return found


def read_scores(folder: Path) -> dict[str, Mapping[str, object]]:
    """Return a run's scores by the name of their row.

    Raises:
        ArtifactError: scores.json is there but is not of the form `{"rows": [{"row": ...}]}`.
    """
    path = folder / "scores.json"
    if not path.is_file():
        return {}
    try:
        return {str(row["row"]): row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def read_records(path: Path) -> list[dict[str, object]]:
    """Read a file of JSON lines.

    Raises:
        ArtifactError: A line is no JSON object.
    """
    records: list[dict[str, object]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _unreadable(path, error, line=number) from error
        if not isinstance(record, dict):
            raise _unreadable(path, TypeError("not a JSON object"), line=number)
        records.append(record)
    return records


def _lines(folders: Mapping[str, Path], stage: str, file: str) -> tuple[Mapping[str, object], ...]:
    path = folders[stage] / file if stage in folders else None
    return tuple(read_records(path)) if path is not None and path.is_file() else ()


def _check(folders: Mapping[str, Path]) -> Mapping[str, object]:
    path = folders["merge"] / "check.json" if "merge" in folders else None
    if path is None or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception, *, line: int | None = None) -> ArtifactError:
    where = str(path) if line is None else f"{path}:{line}"
    return ArtifactError(f"cannot be read: {error}", where=where, remedy=f"delete {path.parent} and run its stage again")
