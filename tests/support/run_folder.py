"""A run folder as five finished stages leave it: real manifests, invented but plausible numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from qwha_cli.artifacts.manifest import Manifest, artifact_key
from qwha_cli.artifacts.store import drafting, publish
from qwha_cli.report.entries import rows_by_entries

FOLDERS = {"quantize": "1-quantize", "init": "2-init", "train": "3-train", "eval": "4-eval", "merge": "5-merge"}
INPUTS = {
    "quantize": (),
    "init": ("quantize",),
    "train": ("init",),
    "merge": ("train",),
    "eval": ("quantize", "init", "train", "merge"),
}
PROJECTIONS = {"q_proj": 1.0, "k_proj": 0.7, "v_proj": 2.4, "o_proj": 0.8, "gate_proj": 0.9, "up_proj": 1.7, "down_proj": 1.5}
RECIPE = """\
name: smollm2-135m-2bit
seed: 0
model:
  id: builtin:smollm2-135m
  device: auto
quantize:
  method: gptq
  bits: 2
  group_size: 64
  basis: hadamard
adapter:
  method: qwha
  rank: 16
train:
  data:
    format: synthetic
  steps: 300
  lr: 0.001
"""
ENVIRONMENT = {
    "python": "3.11.9",
    "system": "Linux x86_64",
    "processor": "A processor with a long name @ 2.60 GHz",
    "cpus": 2,
    "device": "cpu",
    "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
}


def make_run(root: Path, *, stages: tuple[str, ...] = tuple(INPUTS), blocks: int = 30, evil: str = "") -> Path:
    """Write a run with the given stages.

    Args:
        root: The run's folder.
        stages: Which of the five; any subset.
        blocks: Decoder blocks of the model.
        evil: Text put wherever a user, a model or a data set could put text.
    """
    root.mkdir(parents=True)
    (root / "recipe.resolved.yaml").write_text(RECIPE + (f"note: {json.dumps(evil)}\n" if evil else ""), encoding="utf-8")
    keys: dict[str, str] = {}
    for stage in INPUTS:
        settings: dict[str, object] = {"stage": stage} | ({"init": {"method": "pursuit"}} if stage == "init" else {})
        keys[stage] = artifact_key(stage, settings, inputs={name: keys[name] for name in INPUTS[stage]})
        if stage in stages:
            with drafting(root / FOLDERS[stage]) as draft:
                results = WRITERS[stage](draft, blocks, evil)
                notes = (f"a note {evil}",) if evil else ()
                if stage == "quantize":
                    notes += ("no Hadamard matrix of order 1100 is known here: 25 blocks of 44",)
                publish(
                    draft,
                    root / FOLDERS[stage],
                    manifest=Manifest(
                        stage=stage,
                        key=keys[stage],
                        settings=settings,
                        inputs={name: keys[name] for name in INPUTS[stage]},
                        results=results,
                        notes=notes,
                        environment=ENVIRONMENT,
                        seconds={"quantize": 96.4, "init": 58.1, "train": 301.2, "eval": 140.0, "merge": 9.3}[stage],
                    ),
                )
    return root


def layer_records(blocks: int, *, evil: str = "") -> list[dict[str, object]]:
    """Return one record a layer, as the quantize and init stages write them together."""
    random_ = random.Random(7)
    records: list[dict[str, object]] = []
    for block in range(blocks):
        for projection, scale in PROJECTIONS.items():
            zero = 0.02 * scale * (1 + 1.6 * math.exp(-block / 4)) * random_.uniform(0.7, 1.4)
            module = "self_attn" if projection[0] in "qkvo" else "mlp"
            rows = sorted(max(2, round(random_.lognormvariate(3.4, 0.6))) for _ in range(576))
            records.append(
                {
                    "name": f"model.layers.{block}.{module}.{projection}{evil}",
                    "block": block,
                    "projection": projection,
                    "shape": [576, 576],
                    "error_ratio": zero,
                    "sqnr_db": -10 * math.log10(zero) / 2,
                    "bits_per_weight": 2.28,
                    "entries": 18432,
                    "entries_min": rows[0],
                    "entries_median": rows[288],
                    "entries_max": rows[-1],
                    "entries_histogram": rows_by_entries(rows).to_json(),
                    "error_zero": zero,
                    "error_after": zero * random_.uniform(0.5, 0.72),
                    "seconds": random_.uniform(0.1, 0.9),
                }
            )
    return records


def _lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _quantize(draft: Path, blocks: int, evil: str) -> dict[str, object]:
    _lines(draft / "layers.jsonl", layer_records(blocks, evil=evil))
    (draft / "model.safetensors").write_bytes(bytes(60_000))
    return {
        "layer_error_mean": 0.041,
        "bits_per_weight": 2.28,
        "weights": 212_336,
        "megabytes_16_bit": 0.4247,
        "layers": blocks * 7,
    }


def _init(draft: Path, blocks: int, evil: str) -> dict[str, object]:
    _lines(draft / "layers.jsonl", layer_records(blocks, evil=evil))
    (draft / "adapter_model.safetensors").write_bytes(bytes(24_000))
    return {"layer_error_zero_mean": 0.041, "layer_error_mean": 0.025}


def _train(draft: Path, blocks: int, evil: str) -> dict[str, object]:
    random_ = random.Random(3)
    records: list[dict[str, object]] = []
    for step in range(1, 301):
        loss = 0.45 + 1.9 * math.exp(-step / 40) + random_.gauss(0, 0.09)
        records.append(
            {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 0.7, "tokens": 560, "tokens_per_s": 900.0, "wall_s": step}
        )
        if step % 50 == 0:
            records.append({"step": step, "validation_loss": 0.5 + 1.85 * math.exp(-step / 40)})
    _lines(draft / "metrics.jsonl", records)
    (draft / "adapter_model.safetensors").write_bytes(bytes(24_000))
    return {"steps": 300}


def _eval(draft: Path, blocks: int, evil: str) -> dict[str, object]:
    perplexities = {
        "16-bit": (4.1, 17.8),
        "base": (31.7, 96.2),
        "init": (12.4, 41.0),
        "trained": (1.71, 48.3),
        "merged": (1.71, 48.3),
    }
    exact = {"16-bit": 0.28, "base": 0.01, "init": 0.06, "trained": 0.44, "merged": 0.44}
    rows: list[dict[str, object]] = []
    (draft / "samples").mkdir()
    for row, (answers, text) in perplexities.items():
        share = exact[row]
        stderr = math.sqrt(share * (1 - share) / 200)
        task = {
            "task": "arc_easy",
            "metric": "acc_norm",
            "value": share / 2 + 0.3,
            "stderr": 0.031,
            "n": 250,
            "version": 1,
            "shots": 0,
        }
        rows.append(
            {
                "row": row,
                "perplexity_answers": answers,
                "perplexity_text": text,
                "exact_match": share,
                "exact_match_stderr": stderr,
                "n": 200,
                "task:arc_easy": [task],
            }
        )
        _lines(draft / "samples" / f"{row}-exact_match.jsonl", [sample(number, row, evil) for number in range(8)])
    (draft / "scores.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return {"rows": 5}


def sample(number: int, row: str, evil: str = "") -> dict[str, object]:
    """Return one record of exact match for a question of arithmetic."""
    apples, given = 12 + 3 * number, 5 + number
    left = apples - given
    right = row in ("trained", "merged") or (row == "16-bit" and number % 2 == 0)
    steps = f"Maya starts with {apples} apples and gives away {given}.\n{apples} - {given} = {left}\nThe final answer is: {left}"
    return {
        "prompt": f"Maya has {apples} apples. She gives {given} of them to her brother. How many apples are left?{evil}",
        "expected": str(left),
        "response": (steps if right else "Maya the the apples apples\n" * 3 + f"{given}") + evil,
        "found": str(left) if right else str(given),
        "correct": right,
    }


def _merge(draft: Path, blocks: int, evil: str) -> dict[str, object]:
    (draft / "model.safetensors").write_bytes(bytes(424_700))
    check = {"max_logit_difference": 0.062, "kl": 3.1e-5, "prompts": 8}
    (draft / "check.json").write_text(json.dumps(check), encoding="utf-8")
    return {"into": "bf16", **check}


WRITERS: Mapping[str, Callable[[Path, int, str], dict[str, object]]] = {
    "quantize": _quantize,
    "init": _init,
    "train": _train,
    "eval": _eval,
    "merge": _merge,
}
