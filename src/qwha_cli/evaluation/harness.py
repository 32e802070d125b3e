"""lm-eval's own tasks on the live model, in this process, with data from the hub or from local files.

A task is the YAML file that lm-eval ships, included by its absolute path, so its prompts, its Python functions, its filters and
its metrics are lm-eval's and only the place of the data is ours. Every score carries what a reader needs to compare it with
another: task version, shots, filter, a digest of the prompt templates, the data, and its standard error.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from qwha_cli.catalog import TASKS, nearest
from qwha_cli.errors import UsageError
from qwha_cli.evaluation.task_files import LoadedTask, load_task

_TEMPLATES = (
    "description",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "fewshot_delimiter",
    "target_delimiter",
    "gen_prefix",
)


@dataclass(frozen=True)
class TaskRequest:
    """One task to score.

    Attributes:
        name: As in the catalogue.
        shots: Solved examples in the prompt; None for the task's own number.
        limit: Score only so many items, from the begin; None for all.
        data: Split name to local file (.json, .jsonl, .parquet, .csv) in the columns of the task's hub data set; empty for
            the hub.
    """

    name: str
    shots: int | None
    limit: int | None
    data: Mapping[str, str]


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: The task's name.
        metric: For example `acc`, `acc_norm`, `exact_match`.
        filter: How the answer was taken from the output, `none` where there is nothing to take.
        value: The score, a share for all metrics of the catalogue's tasks.
        stderr: lm-eval's standard error, or None if it has none for the metric.
        n: Items scored.
        version: Of the task, as lm-eval states it.
        shots: Solved examples in each prompt.
        template_hash: sha256 over the texts and functions that make prompts and targets.
        data: Split to file for local data, `{"hub": "owner/name/config"}` otherwise.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    version: str
    shots: int
    template_hash: str
    data: dict[str, str]


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskRequest],
    *,
    batch_size: int,
    seed: int,
    autocast: torch.dtype | None = None,
) -> tuple[list[TaskScore], list[dict[str, object]]]:
    """Score tasks.

    Args:
        model: A causal language model of transformers, possibly under peft, on its device. Put into eval mode.
        tokenizer: Its tokenizer.
        tasks: What to score. All data are found and read before the first item is scored.
        batch_size: Items a forward.
        seed: Of the choice of few-shot examples.
        autocast: dtype of matrix products; None for the model's own.

    Returns:
        The scores, task by task, and every item as a JSON-able dict with its task, prompt, outputs and metrics.

    Raises:
        UsageError: A task is not in the catalogue.
        DataError: A task's data cannot be found or do not have its columns.
    """
    for request in tasks:
        if request.name not in TASKS:
            near = nearest(request.name, TASKS)
            raise UsageError(
                f"unknown task {request.name!r}",
                where="eval.tasks",
                remedy=(f"did you mean {near}? " if near else "") + f"known tasks: {', '.join(sorted(TASKS))}",
            )
    scores: list[TaskScore] = []
    samples: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="qwha-tasks-") as scratch, _quiet():
        loaded = [
            load_task(r.name, shots=r.shots, data=r.data, seed=seed, scratch=Path(scratch) / f"{index}-{r.name}")
            for index, r in enumerate(tasks)
        ]
        lm = cast(Any, HFLM)(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=autocast)
        for request, task in zip(tasks, loaded, strict=True):
            results = evaluate(
                lm=lm,
                task_dict=cast(Any, {"tasks": {task.name: task.task}, "groups": {}, "group_map": {}}),
                limit=request.limit,
                bootstrap_iters=1000,
            )
            assert results is not None  # only ranks other than the first get None
            scores += _scores(task, cast("dict[str, Any]", results))
            samples += [
                {"task": task.name, **_plain_dict(item)} for item in cast("dict[str, Any]", results)["samples"][task.name]
            ]
    return scores, samples


def _scores(task: LoadedTask, results: Mapping[str, Any]) -> list[TaskScore]:
    """Take one score for each (metric, filter) out of lm-eval's `metric,filter` keys."""
    numbers = cast("dict[str, Any]", results["results"][task.name])
    found: list[TaskScore] = []
    for key, value in numbers.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr: object = numbers.get(f"{metric}_stderr,{kind}")
        found.append(
            TaskScore(
                task=task.name,
                metric=metric,
                filter=kind,
                value=float(value),
                stderr=_finite(stderr),
                n=int(results["n-samples"][task.name]["effective"]),
                version=str(results["versions"][task.name]),
                shots=int(results["n-shot"][task.name]),
                template_hash=template_hash(results["configs"][task.name]),
                data=task.data,
            )
        )
    return found


def _finite(value: object) -> float | None:
    # lm-eval writes "N/A" where it has no estimate, and nan for a single item
    number = float(cast(Any, value)) if value is not None and not isinstance(value, str) else math.nan
    return number if math.isfinite(number) else None


def template_hash(config: Mapping[str, object]) -> str:
    """Digest of everything in a task's configuration that shapes prompts and targets; functions enter by their source."""
    parts = {name: str(config[name]) for name in _TEMPLATES if config.get(name) is not None}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _plain_dict(value: Mapping[str, object]) -> dict[str, object]:
    return {str(key): _plain(item) for key, item in value.items()}


def _plain(value: object) -> object:
    """Turn numpy numbers, tuples and whatever else lm-eval puts into samples into what json can write."""
    if isinstance(value, dict):
        return _plain_dict(cast("dict[str, object]", value))
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in cast("Sequence[object]", value)]
    if isinstance(value, str | int | float | bool) or value is None:
        return value if type(value).__module__ == "builtins" else _plain(cast(Any, value).item())
    item = getattr(value, "item", None)
    return _plain(item()) if callable(item) else str(value)


class _Unheard(io.StringIO):
    """A stderr that nobody reads, for libraries that draw progress bars on it without asking.

    rich looks for `rich_proxied_file` on whatever stderr is and writes there, so our own display goes on.
    """

    def __init__(self, behind: TextIO) -> None:
        super().__init__()
        self.rich_proxied_file = getattr(behind, "rich_proxied_file", behind)

    def write(self, text: str, /) -> int:
        """Drop the text."""
        return len(text)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence lm-eval's log and the bars of lm-eval and datasets for the block; errors still come as exceptions."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(_Unheard(sys.stderr)):
            yield
    finally:
        logger.setLevel(level)
