"""A task of lm-eval with its data: local files without a network, or the hub with a quick answer when it is away.

lm-eval's public way to change where a task reads is a YAML file that includes the shipped one and overrides keys. The generated
file names local files by split; splits that are not given are switched off, so that lm-eval cannot fall back on the hub or on
another split unnoticed. lm-eval scores the test split if there is one, else the validation split.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from qwha_cli.catalog import TASKS
from qwha_cli.errors import DataError

# What datasets calls the reader of a file.
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_ROLES = ("training_split", "validation_split", "test_split")
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class LoadedTask:
    """A task ready to be scored.

    Attributes:
        name: As in the catalogue.
        task: lm-eval's object, data read.
        data: Split to file, or `{"hub": ...}`.
    """

    name: str
    task: Task
    data: dict[str, str]


def shipped_file(name: str) -> Path:
    """The absolute path of the YAML file that lm-eval ships for a task of the catalogue."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks" / TASKS[name]


def load_task(name: str, *, shots: int | None, data: Mapping[str, str], seed: int, scratch: Path) -> LoadedTask:
    """Load a task and its data.

    Args:
        name: A task of the catalogue.
        shots: Solved examples in the prompt; None for the task's own number.
        data: Split to local file; empty for the hub.
        seed: Of the choice of few-shot examples.
        scratch: A folder for the generated YAML and the read data; must stay until the task is scored.

    Raises:
        DataError: The data cannot be found, or do not have the task's columns.
    """
    scratch.mkdir(parents=True)
    shipped = _write_and_index(scratch, name, {"include": str(shipped_file(name))})
    config = cast("dict[str, Any]", shipped.task_index[name].cfg)
    overrides: dict[str, object] = {"include": str(shipped_file(name)), "num_fewshot": _shots(shots, config)}
    if data:
        overrides |= _local_overrides(name, data, config=config, shots=_shots(shots, config))
        overrides["dataset_kwargs"] = {
            "data_files": {k: str(Path(v).resolve()) for k, v in data.items()},
            "cache_dir": str(scratch),
        }
        origin = dict(data)
    else:
        origin = {"hub": "/".join(str(part) for part in (config["dataset_path"], config.get("dataset_name")) if part)}
        _reach_hub(name, str(config["dataset_path"]), config=config)
    manager = _write_and_index(scratch, name, overrides)
    try:
        task = manager.load([name])["tasks"][name]
    except Exception as error:
        # Loading reads the files and renders the first item; pyarrow, datasets, jinja and the tasks' functions raise their own.
        raise _unreadable(name, data, config=config, error=error) from error
    task.set_fewshot_seed(seed=seed)
    return LoadedTask(name=name, task=task, data=origin)


def _write_and_index(scratch: Path, name: str, content: Mapping[str, object]) -> TaskManager:
    (scratch / f"{name}.yaml").write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    # without the defaults: indexing the 16,000 shipped files takes ten seconds
    return TaskManager(include_path=str(scratch), include_defaults=False)


def _shots(requested: int | None, config: Mapping[str, Any]) -> int:
    return requested if requested is not None else int(config.get("num_fewshot") or 0)


def _local_overrides(name: str, data: Mapping[str, str], *, config: Mapping[str, Any], shots: int) -> dict[str, object]:
    """Check local files against the task's splits and return the keys that make lm-eval read them and nothing else."""
    known = {role: cast("str | None", config.get(role)) for role in _ROLES}
    splits = [split for split in dict.fromkeys([*known.values(), config.get("fewshot_split")]) if split]
    readers = {_check_file(name, split, Path(path), splits=splits) for split, path in data.items()}
    if len(readers) > 1:
        raise DataError("all files of a task must have one format", where=f"eval.data.{name}", remedy="convert them to .jsonl")
    scored = [split for split in (known["test_split"], known["validation_split"]) if split]
    if not any(split in data for split in scored):
        raise DataError(
            f"task {name} is scored on {' or '.join(scored)}, and no file is given for it",
            where=f"eval.data.{name}.{scored[0]}",
            remedy=f"set eval.data.{name}.{scored[0]} to a local file",
        )
    evaluated = next(split for split in scored if split in data)
    teachers = {config.get("fewshot_split"), known["training_split"], known["validation_split"]} & set(data) - {evaluated}
    if shots and not teachers and not (config.get("fewshot_config") or {}).get("samples"):
        source = config.get("fewshot_split") or known["training_split"]
        raise DataError(
            f"{shots} shots need solved examples outside the scored split, and no file is given for them",
            where=f"eval.data.{name}.{source}",
            remedy=f"set eval.data.{name}.{source} to a local file, or ask for 0 shots",
        )
    kept: dict[str, object] = {role: split if split in data else None for role, split in known.items()}
    if config.get("fewshot_split") not in data:
        kept["fewshot_split"] = None
    return {"dataset_path": readers.pop(), "dataset_name": None, **kept}


def _check_file(name: str, split: str, path: Path, *, splits: list[str]) -> str:
    where = f"eval.data.{name}.{split}"
    if split not in splits:
        raise DataError(f"task {name} has no split {split!r}", where=where, remedy=f"its splits are {', '.join(splits)}")
    if not path.is_file():
        raise DataError(f"there is no file {path}", where=where, remedy="paths are relative to the current directory")
    if path.suffix not in _READERS:
        raise DataError(f"{path.name} is none of {', '.join(_READERS)}", where=where, remedy="convert it to .jsonl")
    return _READERS[path.suffix]


def _reach_hub(name: str, dataset: str, *, config: Mapping[str, Any]) -> None:
    """Ask the hub for the data set once with a short timeout: load_dataset would try a dead network for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return  # datasets looks into its cache only, and says at once if nothing is there
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(dataset, timeout=_TIMEOUT_S)
    except Exception as error:
        # the hub's client raises its HTTP library's errors beside its own
        raise _unreadable(name, {}, config=config, error=error) from error


def _unreadable(name: str, data: Mapping[str, str], *, config: Mapping[str, Any], error: Exception) -> DataError:
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    split = next(str(config[role]) for role in reversed(_ROLES) if config.get(role))
    if data:
        return DataError(
            f"the files of task {name} cannot be read as its items ({type(error).__name__}: {cause})",
            where=f"eval.data.{name}",
            remedy=f"the columns must be those of {config['dataset_path']} on the hub",
        )
    return DataError(
        f"the data of task {name}, {config['dataset_path']} on the hub, cannot be had ({cause})",
        where=f"eval.data.{name}",
        remedy=f"name a local file with the recipe key eval.data.{name}.{split}, or connect once so that it is cached",
    )
