"""How good a start is: perplexity and layer errors of quantized bases with untrained adapters, one table for all methods.

    python benchmarks/bench_init.py run --model MODEL --bits 2 --text valid.txt --test test.raw.txt --out results.jsonl
    python benchmarks/bench_init.py table results.jsonl

Every row of a run has the same calibration tokens, the same budget and the same test text, and goes through the product's own
stages quantize and init. Rows that --out has already are not measured again. The budget is the largest rank whose entries are at
most --budget of the quantized weights. Bits a weight count codes, scales, zeros and the adapter: of a sparse one what its file
holds, of a LoRA 16 bits a number, which is fewer than peft writes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from qwha_cli.adapters.build import cache_weights, load_adapter
from qwha_cli.artifacts.manifest import read_manifest
from qwha_cli.catalog import LOW_RANK_INITIALIZERS
from qwha_cli.data.gsm8k import read as read_gsm8k
from qwha_cli.evaluation.answers import answer_perplexity
from qwha_cli.evaluation.perplexity import text_perplexity
from qwha_cli.models.load import load
from qwha_cli.models.targets import find_targets
from qwha_cli.quant.checkpoint import load_base
from qwha_cli.quant.embedding import put_vocabulary, vocabulary_of
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.swap import get_linear
from qwha_cli.quantizers.vocabulary import quantize_words, vocabulary_options
from qwha_cli.recipe.load import load_recipe
from qwha_cli.stages.runner import run_stages

PUBLISHED = {"method": "gptq", "basis": "weight", "zeros": "integer", "sweeps": 0, "damping": 0.01, "grid": "search"}
OURS = {"method": "gptq", "basis": "hadamard"}
GRADIENT = {"calibration": {"weighting": "gradient"}}
BASES: dict[str, dict[str, object]] = {
    "RTN": {"method": "rtn", "basis": "weight", "zeros": "integer", "grid": "search"},
    "GPTQ": PUBLISHED,
    "GPTQ, group 16": PUBLISHED | {"group_size": 16},
    "GPTQ, group 32": PUBLISHED | {"group_size": 32},
    "GPTQ, one bit more": PUBLISHED,
    "GPTQ of W H": PUBLISHED | {"basis": "hadamard"},
    "ours, weight": OURS | {"basis": "weight"},
    "ours": OURS,
    "ours, one bit more": OURS,
    "ours, scales": OURS | {"reconstruct": "scales"},
    "ours, full": OURS | {"reconstruct": "full"},
    "RTN, 8-bit embeddings": {"method": "rtn", "basis": "weight", "zeros": "integer", "grid": "search", "embedding_bits": 8},
    "ours, 8-bit embeddings": OURS | {"embedding_bits": 8},
    "ours, gradient": OURS | GRADIENT,
    "ours, gradient, scales": OURS | GRADIENT | {"reconstruct": "scales"},
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a base, and a start on it."""

    base: str
    start: str = "none"
    init: dict[str, object] = field(default_factory=dict)
    same_bytes: bool = False

    @property
    def low_rank(self) -> bool:
        """Whether the start is that of a LoRA."""
        return self.init.get("method") in LOW_RANK_INITIALIZERS

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.base} + {self.start}" if self.start != "none" else self.base


def _start(base: str, method: str, label: str | None = None, *, same_bytes: bool = False, **init: object) -> Row:
    return Row(base, label or method, {"method": method, **init}, same_bytes)


VALUES = {"reconstruct": "values"}
# rows that no stage makes: the 16-bit model, and that model with nothing in codes but embedding and head
ORIGINAL, WORDS = "16-bit", "16-bit, 8-bit embeddings"
ROWS = [
    Row("RTN"),
    Row("RTN, 8-bit embeddings"),
    Row("GPTQ"),
    _start("GPTQ", "adaalloc", "adaalloc, as published"),
    _start("GPTQ", "cloq"),
    _start("GPTQ", "cloq", "cloq, same bytes", same_bytes=True),
    _start("GPTQ", "loftq"),
    _start("GPTQ", "qera"),
    _start("GPTQ", "pursuit"),
    Row("GPTQ, group 32"),
    Row("GPTQ, group 16"),
    Row("GPTQ, one bit more"),
    Row("GPTQ of W H"),
    _start("GPTQ of W H", "adaalloc"),
    _start("GPTQ of W H", "pursuit"),
    Row("ours, weight"),
    _start("ours, weight", "cloq"),
    _start("ours, weight", "pursuit"),
    Row("ours"),
    _start("ours", "adaalloc"),
    _start("ours", "cloq"),
    _start("ours", "pursuit"),
    _start("ours", "pursuit", "pursuit, values", **VALUES),
    Row("ours, 8-bit embeddings"),
    _start("ours, 8-bit embeddings", "pursuit"),
    Row("ours, scales"),
    _start("ours, scales", "cloq"),
    _start("ours, scales", "pursuit"),
    _start("ours, scales", "pursuit", "pursuit, values", **VALUES),
    Row("ours, full"),
    _start("ours, full", "pursuit"),
    _start("ours, full", "pursuit", "pursuit, values", **VALUES),
    _start("ours, gradient", "pursuit"),
    _start("ours, gradient", "pursuit", "pursuit, global", budget="global"),
    _start("ours, gradient, scales", "pursuit", "pursuit, global, values", budget="global", **VALUES),
    Row("ours, one bit more"),
]


class Silent:
    """A watcher of stages that prints notes only."""

    def note(self, stage: str, text: str) -> None:
        """Print it."""
        print(f"    {stage}: {text}", flush=True)

    def __getattr__(self, name: str) -> object:
        return lambda *args, **kwargs: None


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not known"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"


class Bench:
    """The rows of one model, width, calibration and seed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a = arguments
        self.out = Path(arguments.out)
        self.work = Path(arguments.work)
        self.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        original = load(arguments.model, dtype=self.dtype)
        self.original = original.model
        shapes = [get_linear(original.model, t.name).weight.shape for t in find_targets(original.model)]
        self.weights = sum(out * inside for out, inside in shapes)
        self.sides = sum(out + inside for out, inside in shapes)
        self.rank = int(arguments.budget * self.weights / self.sides)
        self.tokenizer = original.tokenizer

    def key(self) -> dict[str, object]:
        """What a measurement is of, beside its row."""
        a = self.a
        return {
            "model": Path(a.model).name, "bits": a.bits, "group": a.group, "calibration": a.calibration, "samples": a.samples,
            "length": a.length, "budget": a.budget, "seed": a.seed,
        }  # fmt: skip

    def done(self) -> set[str]:
        """Rows that are measured already."""
        if not self.out.is_file():
            return set()
        lines = [json.loads(line) for line in self.out.read_text().splitlines()]
        return {line["row"] for line in lines if all(line.get(k) == v for k, v in self.key().items())}

    def recipe(self, row: Row) -> Path:
        """Write the recipe of a row."""
        a = self.a
        quantize = {"bits": a.bits, "group_size": a.group} | BASES[row.base]
        if row.base.endswith("one bit more"):
            quantize["bits"] = a.bits + 1
        calibration = {
            "data": a.calibration,
            "path": a.text,
            "samples": a.samples,
            "length": a.length,
            "batch_size": a.batch_size,
        }
        adapter = {"rank": self.rank * 3 // 2 if row.same_bytes else self.rank, "method": "lora" if row.low_rank else "qwha"}
        tree = {
            "name": "bench",
            "seed": a.seed,
            "output": str(self.work),
            "model": {"id": a.model, "device": self.device},
            "quantize": quantize | {"calibration": calibration | quantize.get("calibration", {})},
            "adapter": adapter,
            "init": {**row.init, "gate": False},
            "train": {"data": {"format": "synthetic"}, "steps": 1, "lr": 1e-4},
        }
        path = self.work / "recipe.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
        return path

    def words_in_codes(self) -> dict[str, object]:
        """The numbers of the 16-bit model whose embedding and head are in 8 bits."""
        model = copy.deepcopy(self.original)
        vocabulary = vocabulary_of(model, format=vocabulary_options(self.a.group).format)
        weights = {name: model.get_parameter(f"{name}.weight").detach() for name in vocabulary.owners}
        device = torch.device(self.device)
        codes = {n: quantize_words(w, group_size=self.a.group, name=n, device=device) for n, w in weights.items()}
        put_vocabulary(model, vocabulary, codes)
        return self.scores(model) | {"bits_per_weight": 16.0}

    def measure(self, row: Row | None) -> dict[str, object]:
        """The numbers of a row; None for the 16-bit model."""
        if row is None:
            return self.scores(self.original) | {"bits_per_weight": 16.0}
        recipe = load_recipe(self.recipe(row))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        root = self.work / "".join(
            c if c.isalnum() else "-" for c in f"{row.base}-{self.a.bits}-{self.a.calibration}-{self.a.seed}"
        )
        run_stages(recipe, until="quantize" if row.start == "none" else "init", events=Silent(), root=root)
        found: dict[str, object] = {"stage_seconds": round(time.monotonic() - started, 1)}
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None
        base_folder, init_folder = root / "1-quantize", root / "2-init"
        base = read_manifest(base_folder)
        model = load_base(base_folder, dtype=self.dtype).to(self.device)
        found |= {
            "quantize_seconds": round(base.seconds, 1), "layer_error_mean": base.results["layer_error_mean"],
            "layer_error_max": base.results["layer_error_max"], "bits_per_weight": base.results["bits_per_weight"],
        }  # fmt: skip
        if row.start == "none":
            for module in model.modules():
                if isinstance(module, QuantizedLinear):
                    module.keep_dense = True
        else:
            start = read_manifest(init_folder)
            values = start.results["entries"]
            adapter_bits = 16 * values / self.weights if row.low_rank else None
            bits = base.results["bits_per_weight"] + adapter_bits if adapter_bits else start.results["bits_per_weight"]
            found |= {
                "init_seconds": round(start.seconds, 1), "layer_error_mean": start.results["layer_error_mean"],
                "layer_error_max": start.results["layer_error_max"], "bits_per_weight": bits, "entries": values,
            }  # fmt: skip
            model = load_adapter(model, init_folder, trainable=False)
            cache_weights(model, on=True)
        found |= self.scores(model)
        del model
        gc.collect()
        shutil.rmtree(init_folder, ignore_errors=True)
        return found

    def scores(self, model: torch.nn.Module) -> dict[str, object]:
        """Perplexities of a model."""
        model = model.to(self.device).eval()
        found: dict[str, object] = {}
        with torch.inference_mode():
            if self.a.test:
                text = Path(self.a.test).read_text(encoding="utf-8")
                score = text_perplexity(
                    model, self.tokenizer, text, window=self.a.length, stride=self.a.length, max_windows=self.a.windows,
                    batch_size=self.a.batch_size,
                )  # fmt: skip
                found |= {"text": score.value, "text_stderr": score.stderr}
            if self.a.answers:
                examples = read_gsm8k(self.a.answers, split="test", limit=self.a.examples)
                score = answer_perplexity(model, self.tokenizer, examples, max_length=1024, batch_size=32)
                found |= {"answers": score.value, "answers_stderr": score.stderr}
        if model is self.original:
            model.to("cpu")
        return found

    def run(self) -> None:
        """Measure what is missing, a line of --out for each row."""
        wanted = self.a.rows.split(";") if self.a.rows else [ORIGINAL, WORDS, *(row.name for row in ROWS)]
        rows = {row.name: row for row in ROWS}
        facts = {"entries_rank": self.rank, "commit": self.a.commit or _commit(), "device": _device(), "torch": torch.__version__}
        done = self.done()
        for name in wanted:
            if name in done:
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # another process may want what the last row's logits took
            started = time.monotonic()
            try:
                line = self.words_in_codes() if name == WORDS else self.measure(None if name == ORIGINAL else rows[name])
            except Exception as error:
                problems = "; ".join(map(str, getattr(error, "problems", ())))
                print(f"{name}: {type(error).__name__}: {error} {problems}", file=sys.stderr, flush=True)
                continue
            line = {**self.key(), "row": name, **line, **facts, "seconds": round(time.monotonic() - started, 1)}
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            shown = {k: round(v, 4) for k, v in line.items() if isinstance(v, float)}
            print(f"{name}: {shown}", flush=True)


def table(paths: list[str]) -> str:
    """The measured rows as Markdown, one table for every model, width and calibration; seeds as mean and range."""
    lines = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    order = [ORIGINAL, WORDS, *(row.name for row in ROWS)]
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for line in lines:
        groups.setdefault((line["model"], line["bits"], line["group"], line["calibration"]), []).append(line)
    parts: list[str] = []
    for (model, bits, group, calibration), found in groups.items():
        first = found[0]
        parts.append(
            f"### {model}, {bits} bits, group {group}, calibrated on {first['samples']} x {first['length']} tokens of "
            f"{calibration}\n\nRank {first['entries_rank']} (at most {100 * first['budget']:.1f} % of the weights), "
            f"{first['device']}, torch {first['torch']}, commit {', '.join(sorted({str(x['commit']) for x in found}))}.\n"
        )
        parts.append("| | text ppl | answers ppl | mean layer error | worst | bits a weight | quantize s | init s | peak GiB |")
        parts.append("|---|---|---|---|---|---|---|---|---|")
        for name in sorted({str(x["row"]) for x in found}, key=order.index):
            own = [x for x in found if x["row"] == name]
            cells = [_spread(own, "text", 2), _spread(own, "answers", 3), _spread(own, "layer_error_mean", 4)]
            cells += [_spread(own, "layer_error_max", 3), _spread(own, "bits_per_weight", 2), _spread(own, "quantize_seconds", 0)]
            cells += [_spread(own, "init_seconds", 0), _spread(own, "peak_gib", 1)]
            parts.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _spread(lines: list[dict[str, object]], key: str, digits: int) -> str:
    values = [float(line[key]) for line in lines if line.get(key) is not None]
    if not values:
        return "–"
    mean = f"{sum(values) / len(values):.{digits}f}"
    distinct = len({round(v, digits) for v in values}) > 1 and digits > 1
    return f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})" if distinct else mean


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure rows")
    run.add_argument("--model", required=True, help="as model.id in a recipe")
    run.add_argument("--bits", type=int, default=2)
    run.add_argument("--group", type=int, default=64)
    run.add_argument("--budget", type=float, default=0.042, help="entries as a share of the weights")
    run.add_argument("--calibration", default="wikitext2", help="as quantize.calibration.data")
    run.add_argument("--text", help="local file of the calibration text")
    run.add_argument("--samples", type=int, default=64)
    run.add_argument("--length", type=int, default=1024)
    run.add_argument("--batch-size", type=int, default=4)
    run.add_argument("--test", help="raw text for the perplexity of running text")
    run.add_argument("--windows", type=int, default=64)
    run.add_argument("--answers", help="GSM8K test.jsonl for the perplexity of answers")
    run.add_argument("--examples", type=int, default=None, help="so many of them; all by default")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--rows", help="names of rows, separated by ;")
    run.add_argument("--work", default="/tmp/qwha-bench-init", help="folder for bases; may be deleted")
    run.add_argument("--commit", help="to be noted, where this is no git checkout")
    run.add_argument("--out", required=True)
    shown = commands.add_parser("table", help="print the tables")
    shown.add_argument("results", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(arguments.results))
    else:
        Bench(arguments).run()


if __name__ == "__main__":
    main()
