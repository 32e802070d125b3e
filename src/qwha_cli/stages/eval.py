"""The eval stage: the same measurements on every row of the table, from the 16-bit model to the merged one.

Each measurement is kept in the run's work folder as soon as it is there, under the key of what it measured and how; a killed or a
changed evaluation measures only what is missing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qwha_cli import catalog
from qwha_cli.adapters.build import adapted_layers, cache_weights, load_adapter
from qwha_cli.artifacts.manifest import digest
from qwha_cli.artifacts.store import write_atomically
from qwha_cli.data.example import Example
from qwha_cli.evaluation.answers import answer_perplexity, exact_match
from qwha_cli.evaluation.perplexity import text_perplexity
from qwha_cli.models.load import load_tokenizer
from qwha_cli.quant.checkpoint import load_base
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.stages.calibrated import load_original
from qwha_cli.stages.context import StageContext
from qwha_cli.stages.train import read_examples

Measure = Callable[[], dict[str, object]]


def run(context: StageContext) -> dict[str, object]:
    """Measure every row of the recipe and write scores.json and samples/; return a summary."""
    recipe = context.recipe
    rows: list[dict[str, object]] = []
    measurements = _Measurements(context)
    (context.draft / "samples").mkdir()
    for row in recipe.eval.rows:
        started = time.monotonic()
        scores: dict[str, object] = {"row": row}
        for name in measurements.names():
            scores |= measurements.take(row, name)
        scores["eval_seconds"] = round(time.monotonic() - started, 2)
        rows.append(scores)
        measurements.release()
    text = json.dumps({"rows": rows}, indent=2)
    (context.draft / "scores.json").write_text(text + "\n", encoding="utf-8")
    return {"rows": len(rows), "measurements": measurements.names()}


class _Measurements:
    """The measurements of one evaluation; loads a row's model only when something is not measured yet."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.settings = context.recipe.eval
        # Not the stage's work folder: that one is deleted when the artifact is there, and these serve the next evaluation too.
        self.kept = context.draft.parent / ".work" / "scores"
        self.total = len(self.settings.rows) * max(1, len(self.names()))
        self.done = 0
        self.model: nn.Module | None = None
        folder = context.inputs.get("quantize")
        self.tokenizer = load_tokenizer(folder) if folder else load_original(context, dtype=None).tokenizer
        self._examples: list[Example] | None = None

    def names(self) -> list[str]:
        """Return the measurements asked for, in order of cost."""
        found: list[str] = []
        if self.settings.answers is not None:
            found.append("answers")
        if self.settings.perplexity is not None:
            found.append("text")
        if self.settings.answers is not None and self.settings.answers.exact_match:
            found.append("exact_match")
        return found + [f"task:{task.name}" for task in self.settings.tasks]

    def take(self, row: str, name: str) -> dict[str, object]:
        """Return one measurement of one row, from the kept ones where it is there."""
        self.context.progress(self.done, self.total, f"{row}: {name}")
        path = self.kept / f"{digest(self._identity(row, name))}.json"
        if path.is_file():
            record: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
        else:
            if self.model is None:
                self.model = self._load(row)
            record = self._measure(name)
            write_atomically(path, json.dumps(record))
        samples = cast(list[object], record.pop("samples", []))
        if samples:
            file = self.context.draft / "samples" / f"{row}-{name.replace(':', '-')}.jsonl"
            file.write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
        if "tasks" in record:
            record = {name: record["tasks"]}
        self.done += 1
        self.context.progress(self.done, self.total, f"{row}: {name}")
        return record

    def release(self) -> None:
        """Forget the row's model."""
        self.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _identity(self, row: str, name: str) -> dict[str, object]:
        """Everything that decides a measurement's value."""
        if row == "16-bit":
            source: object = self.context.manifests["quantize"].inputs if "quantize" in self.context.manifests else {}
            source = {"model": self.context.recipe.dump()["model"], "inputs": source}
        else:
            last = {"base": "quantize", "init": "init", "trained": "train", "merged": "merge"}[row]
            source = self.context.manifests[last].key
        settings = self.settings.model_dump(mode="json")
        kept = {"batch_size": settings["batch_size"], "limit": settings["limit"]}
        if name in ("answers", "exact_match"):
            kept["how"] = settings["answers"]
            kept["max_length"] = self.context.recipe.train.max_length
        elif name == "text":
            kept["how"] = settings["perplexity"]
        else:
            kept["how"] = [t for t in settings["tasks"] if t["name"] == name.removeprefix("task:")]
            kept["data"] = settings["data"].get(name.removeprefix("task:"))
        return {
            "row": row,
            "source": source,
            "name": name,
            "settings": kept,
            "seed": self.context.recipe.seed,
            "device": str(self.context.device),
        }

    def _load(self, row: str) -> nn.Module:
        """Load a row's model onto the device, with dense weights cached where layers are packed."""
        context = self.context
        if row == "16-bit":
            model = load_original(context, dtype=context.dtype).model
        elif row == "merged":
            model = AutoModelForCausalLM.from_pretrained(context.inputs["merge"], dtype=context.dtype)
        else:
            model = load_base(context.inputs["quantize"], dtype=context.dtype)
            if row != "base":
                model = load_adapter(model, context.inputs["init" if row == "init" else "train"], trainable=False)
        ready = cast(nn.Module, model).to(context.device).eval()
        cache_weights(ready, True)
        inside = {id(layer.base_layer) for layer in adapted_layers(ready).values()}
        for module in ready.modules():
            if isinstance(module, QuantizedLinear) and id(module) not in inside:
                module.keep_dense = True
        return ready

    def _measure(self, name: str) -> dict[str, object]:
        context, settings = self.context, self.settings
        assert self.model is not None
        if name == "answers":
            score = answer_perplexity(
                self.model,
                self.tokenizer,
                self._held_out(),
                max_length=context.recipe.train.max_length,
                batch_size=settings.batch_size,
            )
            return {"perplexity_answers": score.value, "perplexity_answers_stderr": score.stderr, "answers": score.n}
        if name == "text":
            how = settings.perplexity
            assert how is not None
            read = catalog.load(catalog.TEXTS[how.data])
            text = read(how.path, split=how.split)  # pyright: ignore[reportCallIssue]
            score = text_perplexity(
                self.model,
                self.tokenizer,
                text,
                window=how.window,
                stride=how.stride,
                max_windows=how.windows,
                batch_size=settings.batch_size,
            )
            return {"perplexity_text": score.value, "perplexity_text_stderr": score.stderr, "text_tokens": score.n}
        if name == "exact_match":
            return self._exact_match()
        task = next(t for t in settings.tasks if t.name == name.removeprefix("task:"))
        # the harness takes seconds to import, and the other stages share a process with this one
        from qwha_cli.evaluation.harness import TaskRequest, run_tasks

        request = TaskRequest(
            name=task.name,
            shots=task.shots,
            limit=task.limit if task.limit is not None else settings.limit,
            data=dict(settings.data.get(task.name, {})),
        )
        scores, samples = run_tasks(
            self.model, self.tokenizer, [request], batch_size=settings.batch_size, seed=context.recipe.seed
        )
        return {"tasks": [dataclasses.asdict(score) for score in scores], "samples": samples}

    def _exact_match(self) -> dict[str, object]:
        answers = self.settings.answers
        assert answers is not None
        assert self.model is not None
        examples = [e for e in self._held_out() if e.answer is not None][: answers.exact_match]
        score, samples = exact_match(
            self.model,
            self.tokenizer,
            examples,
            max_new_tokens=answers.max_new_tokens,
            batch_size=self.settings.batch_size,
        )
        return {"exact_match": score.value, "exact_match_stderr": score.stderr, "n": score.n, "samples": samples}

    def _held_out(self) -> list[Example]:
        if self._examples is None:
            answers = self.settings.answers
            assert answers is not None
            self._examples = read_examples(answers, recipe=self.context.recipe, tokenizer=self.tokenizer)
        return self._examples
