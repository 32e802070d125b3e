"""The table of contents of what the product can do: every quantizer, initializer, adapter, data set and task by name.

Values are dotted strings `module:attribute`, so that reading the catalogue imports nothing. Tasks name lm-eval's own YAML
file, relative to its tasks folder.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping

QUANTIZERS: Mapping[str, str] = {
    "gptq": "qwha_cli.quantizers.gptq:quantize",
    "nf4": "qwha_cli.quantizers.nf4:quantize",
    "rtn": "qwha_cli.quantizers.rtn:quantize",
}

# Of a sparse adapter (adapter.method qwha): (delta, gram, budget, options) -> SparseRows, in the Hadamard domain.
INITIALIZERS: Mapping[str, str] = {
    "adaalloc": "qwha_cli.initializers.adaalloc:initialize",
    "pursuit": "qwha_cli.initializers.pursuit:initialize",
    "random": "qwha_cli.initializers.random:initialize",
    "zero": "qwha_cli.initializers.zero:initialize",
}

# Of a low-rank adapter (adapter.method lora): (delta, gram, rank, options) -> LowRank, in the weight basis.
LOW_RANK_INITIALIZERS: Mapping[str, str] = {
    "cloq": "qwha_cli.initializers.low_rank:cloq",
    "loftq": "qwha_cli.initializers.low_rank:loftq",
    "qera": "qwha_cli.initializers.low_rank:qera",
    "zero": "qwha_cli.initializers.low_rank:zero",
}

ADAPTERS: Mapping[str, str] = {
    "lora": "qwha_cli.adapters.low_rank.model:LowRankModel",
    "qwha": "qwha_cli.adapters.spectral.model:SpectralModel",
}

# Training and held-out data: a function (path, split, seed) -> list[Example].
DATASETS: Mapping[str, str] = {
    "alpaca": "qwha_cli.data.alpaca:read",
    "chat": "qwha_cli.data.chat:read",
    "gsm8k": "qwha_cli.data.gsm8k:read",
    "jsonl": "qwha_cli.data.jsonl:read",
    "synthetic": "qwha_cli.data.synthetic:read",
}

# Running text for calibration and perplexity: a function (path, split) -> str.
TEXTS: Mapping[str, str] = {
    "prose": "qwha_cli.data.prose:read",
    "text": "qwha_cli.data.text:read",
    "wikitext2": "qwha_cli.data.wikitext:read",
}

TASKS: Mapping[str, str] = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name closest to a misspelt one, or None when nothing is near."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return found[0] if found else None


def load(entry: str) -> object:
    """Import a `module:attribute` string of this catalogue and return the attribute."""
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)
