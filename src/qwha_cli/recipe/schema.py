"""The recipe as an object: frozen, checked, and equal to what its own `dump` loads to.

The sections live in quantize_section.py and train_section.py; their field descriptions are the text of docs/recipes.md. This file
knows no YAML positions (load.py does) and nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import yaml
from pydantic import Field

from qwha_cli.catalog import INITIALIZERS, LOW_RANK_INITIALIZERS
from qwha_cli.recipe.positions import resolve_scalar
from qwha_cli.recipe.quantize_section import AdapterSection, InitSection, ModelSection, QuantizeSection
from qwha_cli.recipe.section import Fault, Section, Text, shaped
from qwha_cli.recipe.train_section import EvalSection, MergeSection, TrainSection


class Recipe(Section):
    """A whole run."""

    name: Annotated[
        str,
        shaped(r"[A-Za-z0-9][A-Za-z0-9._-]*", expected="a folder's name of letters, digits, `.`, `_` and `-`"),
        Field(description="Name of the run's folder: letters, digits, `.`, `_`, `-`."),
    ]
    seed: Annotated[Annotated[int, Field(ge=0, lt=2**32)], Field(description="Decides everything random.")] = 0
    output: Annotated[Text, Field(description="Folder of the runs; `~` is expanded.")] = "runs"
    model: Annotated[ModelSection, Field(description="The model.")]
    quantize: Annotated[QuantizeSection, Field(description="How it is quantized.")]
    adapter: Annotated[AdapterSection, Field(description="The trainable part.")] = AdapterSection()
    init: Annotated[InitSection, Field(description="What training starts from.")] = InitSection()
    train: Annotated[TrainSection, Field(description="The training.")]
    eval: Annotated[EvalSection, Field(description="What is measured.")] = EvalSection()
    merge: Annotated[MergeSection, Field(description="The ordinary model folder at the end.")] = MergeSection()

    def faults(self) -> Iterator[Fault]:
        """Yield what cannot stand together across sections."""
        answers, data = self.eval.answers, self.train.data
        if answers is not None and answers.path is not None and answers.path == data.path:
            yield Fault(("eval", "answers", "path"), "the training file is scored too", "give a held-out file")
        if self.adapter.targets != "all-linear":
            for name in sorted(set(self.adapter.exclude) & set(self.adapter.targets)):
                yield Fault(("adapter", "exclude"), f"{name} is both a target and excluded", "remove one")
        yield from self._start_faults()
        if self.train.precision == "fp8" and (self.adapter.method == "lora" or self.quantize.basis != "hadamard"):
            hint = "set train.precision=bf16, or adapter.method=qwha and quantize.basis=hadamard"
            yield Fault(("train", "precision"), "8-bit products are those of a qwha adapter in the Hadamard basis", hint)

    def _start_faults(self) -> Iterator[Fault]:
        """Yield the start that the kind of adapter cannot have."""
        kind, method = self.adapter.method, self.init.method
        if kind == "lora" and self.init.reconstruct != "none":
            yield Fault(("init", "reconstruct"), "only the values of a qwha are reconstructed", "set init.reconstruct=none")
        starts, usual = (LOW_RANK_INITIALIZERS, "cloq") if kind == "lora" else (INITIALIZERS, "pursuit")
        if self.init.budget == "global" and kind == "qwha" and self.quantize.calibration.weighting == "none":
            hint = "set init.budget=per_layer, or quantize.calibration.weighting=gradient"
            yield Fault(("init", "budget"), "a global budget needs what the loss minds, which is not measured", hint)
        if method in starts:
            return
        other = f", or adapter.method={'qwha' if kind == 'lora' else 'lora'}"
        hint = f"set init.method={usual}{other} ({kind} has {', '.join(sorted(starts))})"
        yield Fault(("init", "method"), f"a {kind} adapter has no start called {method}", hint)

    def dump(self) -> dict[str, Any]:
        """Return every setting, defaults included, as plain JSON and YAML values that load to an equal recipe.

        Keys that the chosen method does not have are left out.
        """
        full: dict[str, Any] = self.model_dump(mode="json")
        if self.quantize.method == "nf4":
            del full["quantize"]["grid"], full["quantize"]["zeros"]
        elif self.quantize.symmetric:
            full["quantize"]["zeros"] = "integer"
        if self.quantize.method != "gptq":
            del full["quantize"]["sweeps"]
        if self.init.method == "zero":
            del full["init"]["gate"]
        return full

    def to_yaml(self) -> str:
        """Return `dump` as YAML, keys in the schema's order."""
        return yaml.dump(self.dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our reader would take for something else: PyYAML itself sees `7e5` (a commit?) as text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(resolve_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
