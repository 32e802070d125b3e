"""From a recipe to the artifacts it asks for: which stages, in which order, with which keys.

A stage's key covers the settings that can change its result, the contents of every local file it reads, and the keys of its
inputs. How often it saves, what it keeps in memory and the device it runs on are left out: they change nothing but time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwha_cli.artifacts.manifest import artifact_key
from qwha_cli.artifacts.store import sha256_of
from qwha_cli.recipe.schema import Recipe

STAGES = ("quantize", "init", "train", "eval", "merge")
FOLDERS = {"quantize": "1-quantize", "init": "2-init", "train": "3-train", "eval": "4-eval", "merge": "5-merge"}
# Settings that cannot change what comes out by more than rounding.
_IRRELEVANT = {"save_every", "keep", "checkpointing", "kernels", "backend", "attention", "launch"}
# What each row of the evaluation reads.
_ROW_INPUTS = {
    "16-bit": (),
    "base": ("quantize",),
    "init": ("quantize", "init"),
    "trained": ("quantize", "init", "train"),
    "merged": ("quantize", "init", "train", "merge"),
}


@dataclass(frozen=True)
class PlannedStage:
    """One artifact that a recipe asks for."""

    stage: str
    folder: Path
    settings: Mapping[str, object]
    inputs: Mapping[str, str]
    key: str


def plan(recipe: Recipe, *, root: Path) -> dict[str, PlannedStage]:
    """Return every stage of a recipe in an order in which each comes after its inputs.

    Args:
        recipe: The recipe.
        root: The run's folder.
    """
    planned: dict[str, PlannedStage] = {}
    inputs_of = {"quantize": (), "init": ("quantize",), "train": ("init",), "merge": ("train",), "eval": eval_inputs(recipe)}
    order = ["quantize", "init", "train"] + (["merge", "eval"] if "merge" in inputs_of["eval"] else ["eval", "merge"])
    for stage in order:
        settings = stage_settings(recipe, stage)
        inputs = {parent: planned[parent].key for parent in inputs_of[stage]}
        key = artifact_key(stage, settings, inputs=inputs)
        planned[stage] = PlannedStage(stage, root / FOLDERS[stage], settings, inputs, key)
    return planned


def eval_inputs(recipe: Recipe) -> tuple[str, ...]:
    """Return the stages whose artifacts the rows of the evaluation need, in order."""
    needed = {stage for row in recipe.eval.rows for stage in _ROW_INPUTS[row]}
    return tuple(stage for stage in ("quantize", "init", "train", "merge") if stage in needed)


def ancestors(planned: Mapping[str, PlannedStage], stage: str) -> list[str]:
    """Return `stage` and every stage it needs, in order of execution."""
    needed = {stage}
    for name in reversed(list(planned)):
        if name in needed:
            needed.update(planned[name].inputs)
    return [name for name in planned if name in needed]


def stage_settings(recipe: Recipe, stage: str) -> dict[str, object]:
    """Return the part of a recipe that decides a stage's result, JSON-able."""
    full = recipe.dump()
    if stage == "quantize":
        model = {k: v for k, v in full["model"].items() if k != "device"}
        settings: dict[str, object] = {"model": model, "quantize": full["quantize"], "seed": full["seed"]}
        settings["files"] = _files(full["quantize"]) | _model_files(recipe.model.id)
    elif stage == "init":
        settings = {"adapter": full["adapter"], "init": full["init"], "seed": full["seed"]}
    elif stage == "train":
        kept = {k: v for k, v in full["train"].items() if k not in _IRRELEVANT}
        settings = {"train": kept, "seed": full["seed"], "files": _files(kept)}
    elif stage == "eval":
        settings = {"eval": full["eval"], "seed": full["seed"], "files": _files(full["eval"])}
    else:
        settings = {"merge": full["merge"]}
    return settings


def _files(section: object) -> dict[str, str]:
    """Hash every existing local file named by a `path` key, or by the leaves of a `data` mapping, below a section."""
    found: dict[str, str] = {}
    if isinstance(section, Mapping):
        for value in section.values():
            found |= _files(value)
    elif isinstance(section, list | tuple):
        for value in section:
            found |= _files(value)
    elif isinstance(section, str) and ("/" in section or "." in section) and Path(section).expanduser().is_file():
        found[section] = sha256_of(Path(section).expanduser())
    return found


def _model_files(model_id: str) -> dict[str, str]:
    """Identify a local model: its configuration by contents, its weights by size (hashing them would read the whole model)."""
    path = Path(model_id).expanduser()
    if path.is_file():
        return {path.name: str(path.stat().st_size)}
    if not path.is_dir():
        return {}
    listed = {p.name: str(p.stat().st_size) for p in sorted(path.iterdir()) if p.suffix in {".safetensors", ".gguf"}}
    config = path / "config.json"
    return listed | ({"config.json": sha256_of(config)} if config.is_file() else {})
