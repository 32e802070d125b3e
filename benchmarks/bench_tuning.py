"""Whether a better start survives tuning: GSM8K, one learning-rate grid for all rows, the same data order, then exact match.

    python benchmarks/bench_tuning.py run --model MODEL --train train.jsonl --test test.jsonl --text valid.txt --out results.jsonl
    python benchmarks/bench_tuning.py table results.jsonl

Every row goes through the product's own quantization, initialisation and training loop. The learning rate of a row is the one of
the grid with the lowest loss on a part of train that is held out, after one epoch with the first seed; all its other runs use it.
Scores are those of the merged model in bfloat16 on the whole test split. Several processes with the same arguments, on one GPU or
on many, share the work: each job is claimed by a file in --work, and what --out holds already is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import yaml
from bench_init import BASES, VALUES, Bench, Silent
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from qwha_cli.adapters.build import load_adapter
from qwha_cli.adapters.keep import set_keep
from qwha_cli.catalog import LOW_RANK_INITIALIZERS
from qwha_cli.data.gsm8k import read as read_gsm8k
from qwha_cli.data.split import train_validation
from qwha_cli.data.tokenize import encode
from qwha_cli.evaluation.answers import answer_perplexity, exact_match
from qwha_cli.models.load import load
from qwha_cli.quant.checkpoint import load_base
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.recipe.load import load_recipe
from qwha_cli.stages.merge import merge_model
from qwha_cli.stages.runner import run_stages
from qwha_cli.training.loop import TrainSettings, train

# row: base of bench_init (None: the 16-bit model), init section
ROWS: dict[str, tuple[str | None, dict[str, object]]] = {
    "16-bit + LoRA": (None, {}),
    "GPTQ + LoRA, cloq": ("GPTQ", {"method": "cloq"}),
    "GPTQ + adaalloc, as published": ("GPTQ", {"method": "adaalloc"}),
    "ours, weight + pursuit": ("ours, weight", {"method": "pursuit"}),
    "ours + pursuit": ("ours", {"method": "pursuit"}),
    "ours, scales + pursuit, values": ("ours, scales", {"method": "pursuit"} | VALUES),
    "ours + LoRA, cloq": ("ours", {"method": "cloq"}),
}
# rows that differ from another in the arithmetic of their training alone, and start where it does
FP8 = {"ours + pursuit, fp8": "ours + pursuit"}
HELD_OUT = 256


@dataclass(frozen=True)
class Job:
    """A piece of work: `prepare` a row, `train` it, or `score` what a training left (or the start: epochs 0)."""

    kind: str
    row: str
    lr: float = 0.0
    epochs: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """A file name."""
        text = f"{self.kind}-{self.row}-{self.lr:g}-{self.epochs}-{self.seed}"
        return "".join(c if c.isalnum() else "-" for c in text)


class Study:
    """All jobs of a command line, shared among processes by files."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a = arguments
        self.work = Path(arguments.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.out = Path(arguments.out)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        bench = Bench(arguments)
        self.tokenizer, self.rank = bench.tokenizer, bench.rank
        examples = read_gsm8k(arguments.train, split="train", limit=arguments.train_limit)
        kept, held = train_validation(examples, size=min(HELD_OUT, len(examples) // 4), seed=0)
        self.train, self.held = ([encode(e, self.tokenizer, max_length=512) for e in part] for part in (kept, held))
        self.test = read_gsm8k(arguments.test, split="test", limit=arguments.test_limit)
        self.rows = arguments.rows.split(";") if arguments.rows else list(ROWS)
        self.lrs = [float(x) for x in arguments.lrs.split(",")]
        self.epochs = [int(x) for x in arguments.epochs.split(",")]
        self.seeds = [int(x) for x in arguments.seeds.split(",")]

    # ---- the order of the work

    def jobs(self) -> Iterator[Job]:
        """Everything that can be named now; the rest follows when the learning rates are known."""
        yield from dict.fromkeys(Job("prepare", _start(row)) for row in self.rows)
        rows = [row for row in self.rows if not self._is_lost(row)]
        yield from (Job("train", row, lr, 1, self.seeds[0]) for row in rows for lr in self.lrs)
        yield from (Job("score", row) for row in rows)
        best = {row: self.best(row) for row in rows}
        for seed in self.seeds:
            for epochs in self.epochs:
                for row, lr in ((row, lr) for row, lr in best.items() if lr is not None):
                    yield Job("train", row, lr, epochs, seed)
                    yield Job("score", row, lr, epochs, seed)

    def complete(self) -> bool:
        """Whether nothing is left."""
        measured = all(self._is_lost(row) or self.best(row) is not None for row in self.rows)
        return measured and all(self._is_done(job) for job in self.jobs())

    def best(self, row: str) -> float | None:
        """The learning rate of a row, once its grid is measured; a training that failed counts as infinitely bad."""
        losses: dict[float, float] = {}
        for lr in self.lrs:
            path = self.work / f"{Job('train', row, lr, 1, self.seeds[0]).name}.json"
            if not path.is_file():
                return None
            found = json.loads(path.read_text()).get("validation_loss")
            losses[lr] = math.inf if found is None else float(found)
        return min(losses, key=lambda lr: losses[lr])

    def run(self) -> None:
        """Take what is ready until all is done."""
        while not self.complete():
            job = next((job for job in self.jobs() if self._is_ready(job) and self._claim(job)), None)
            if job is None:
                time.sleep(1)
                continue
            started = time.monotonic()
            try:
                line = {"prepare": self._prepare, "train": self._train, "score": self._score}[job.kind](job)
            except Exception as error:
                problems = "; ".join(map(str, getattr(error, "problems", ())))
                print(f"{job.name}: {type(error).__name__}: {error} {problems}", file=sys.stderr, flush=True)
                line = {"failed": f"{type(error).__name__}: {error}"}
            if self.device == "cuda":
                torch.cuda.empty_cache()
            line |= {"seconds": round(time.monotonic() - started, 1)}
            self._write(job, line)

    def _write(self, job: Job, line: dict[str, object]) -> None:
        path = self.work / f"{job.name}.json"
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(line))
        draft.rename(path)
        facts = {
            "model": Path(self.a.model).name, "bits": self.a.bits, "rank": self.rank, "commit": self.a.commit,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "CPU", "torch": torch.__version__,
        }  # fmt: skip
        with self.out.open("a") as file:
            file.write(json.dumps({**asdict(job), **line, **facts}) + "\n")
        print(job.name, {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}, flush=True)

    def _is_done(self, job: Job) -> bool:
        return (self.work / f"{job.name}.json").is_file()

    def _is_lost(self, row: str) -> bool:
        """Whether a row could not be prepared."""
        path = self.work / f"{Job('prepare', _start(row)).name}.json"
        return path.is_file() and "failed" in json.loads(path.read_text())

    def _is_ready(self, job: Job) -> bool:
        if self._is_done(job) or (self.work / f"{job.name}.claim").exists():
            return False
        if job.kind == "prepare":
            return True
        needs = [Job("prepare", _start(job.row))]
        if job.kind == "score" and job.epochs:
            needs.append(Job("train", job.row, job.lr, job.epochs, job.seed))
        return all(self._is_done(need) for need in needs)

    def _claim(self, job: Job) -> bool:
        try:
            os.close(os.open(self.work / f"{job.name}.claim", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    # ---- the work

    def _root(self, row: str) -> Path:
        return self.work / f"root-{Job('prepare', _start(row)).name}"

    def _prepare(self, job: Job) -> dict[str, object]:
        base, init = ROWS[job.row]
        if base is None:
            return {}
        tree = {
            "name": "tuning",
            "output": str(self.work),
            "model": {"id": self.a.model, "device": self.device},
            "quantize": {"bits": self.a.bits, "group_size": self.a.group} | BASES[base],
            "adapter": {"rank": self.rank, "method": "lora" if init["method"] in LOW_RANK_INITIALIZERS else "qwha"},
            "init": {**init, "gate": False},
            "train": {"data": {"format": "synthetic"}, "steps": 1, "lr": 1e-4},
        }
        calibration = {
            "data": "wikitext2",
            "path": self.a.text,
            "samples": self.a.samples,
            "length": self.a.length,
            "batch_size": 4,
        }
        quantize = cast("dict[str, object]", tree["quantize"])
        quantize["calibration"] = calibration | cast("dict[str, object]", quantize.get("calibration", {}))
        path = self.work / f"{job.name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        result = run_stages(load_recipe(path), until="init", events=Silent(), root=self._root(job.row))
        return {"bits_per_weight": result.stages["init"].results["bits_per_weight"]}

    def _model(self, row: str, *, trainable: bool) -> PeftModel:
        if ROWS[_start(row)][0] is None:
            model = load(self.a.model, dtype=self.dtype).model
            torch.manual_seed(0)
            names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            adapted = get_peft_model(model, LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=names))
        else:
            root = self._root(row)
            base = load_base(root / "1-quantize", dtype=self.dtype)
            adapted = load_adapter(base, root / "2-init", trainable=trainable)
            if trainable:
                set_keep(adapted, "speed")
                for module in adapted.modules():
                    if isinstance(module, QuantizedLinear):
                        module.keep_dense = True
        return cast(PeftModel, cast(nn.Module, adapted).to(self.device))

    def _train(self, job: Job) -> dict[str, object]:
        model = self._model(job.row, trainable=True)
        settings = TrainSettings(
            lr=job.lr, pad_id=cast(int, self.tokenizer.pad_token_id), seed=job.seed, epochs=job.epochs,
            batch_size=self.a.rows_per_step, max_length=512, packing=True, save_every=None,
            validate_every=10**9, precision="fp8" if job.row in FP8 else "auto",
        )  # fmt: skip
        outcome = train(
            model, self.train, encoded_validation=self.held, settings=settings, work_dir=self.work / f"{job.name}.work",
            identity=job.name, progress=_Quiet(), interrupted=lambda: False,
        )  # fmt: skip
        values = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(values, self.work / f"{job.name}.safetensors")
        summary = outcome.summary()
        return {
            "validation_loss": summary["last_validation_loss"], "first_validation_loss": summary["first_validation_loss"],
            "train_seconds": summary["train_wall_s"], "tokens": summary["tokens"], "steps": summary["steps"],
            "peak_gib": summary["peak_gib"],
        }  # fmt: skip

    def _score(self, job: Job) -> dict[str, object]:
        values = self.work / f"{Job('train', job.row, job.lr, job.epochs, job.seed).name}.safetensors"
        if job.epochs and not values.is_file():
            return {"failed": "nothing was trained"}
        model = self._model(job.row, trainable=True)
        if job.epochs:
            trained = load_file(values)
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in trained.items():
                    own[name].copy_(value)
        merged = cast(nn.Module, merge_model(model, dtype=self.dtype)).to(self.device).eval()
        with torch.inference_mode():
            answers = answer_perplexity(merged, self.tokenizer, self.test, max_length=1024, batch_size=32)
            exact, _ = exact_match(merged, self.tokenizer, self.test, max_new_tokens=320, batch_size=self.a.generate)
        return {
            "answers": answers.value, "answers_stderr": answers.stderr, "exact": exact.value, "exact_stderr": exact.stderr,
            "n": exact.n,
        }  # fmt: skip


def _start(row: str) -> str:
    """The row whose quantization and initialisation a row has."""
    return FP8.get(row, row)


class _Quiet:
    """A watcher of the training that says nothing."""

    def __getattr__(self, name: str) -> object:
        return lambda *args, **kwargs: None


def table(paths: Iterable[str]) -> str:
    """The scores as Markdown: before, and after each number of epochs; seeds as mean and range."""
    lines = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    scores = [line for line in lines if line["kind"] == "score" and "failed" not in line]
    epochs = sorted({line["epochs"] for line in scores})
    bits = {line["row"]: line.get("bits_per_weight") for line in lines if line["kind"] == "prepare"}
    head = [f"{'before' if not e else f'{e} epoch' + 's' * (e > 1)}, {what}" for e in epochs for what in ("ppl", "exact match %")]
    parts = ["| | bits a weight | learning rate | " + " | ".join(head) + " |", "|---" * (3 + len(head)) + "|"]
    for row in (*ROWS, *FP8):
        own = [line for line in scores if line["row"] == row]
        if not own:
            continue
        rates = {line["lr"] for line in own if line["epochs"]}
        cells = [f"{bits.get(_start(row)) or 16:.2f}", ", ".join(f"{rate:g}" for rate in sorted(rates)) or "–"]
        for e in epochs:
            found = [line for line in own if line["epochs"] == e]
            cells += [_spread([line["answers"] for line in found], 3), _spread([100 * line["exact"] for line in found], 1)]
        parts.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(parts)


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do what is missing")
    run.add_argument("--model", required=True, help="as model.id in a recipe")
    run.add_argument("--train", required=True, help="GSM8K's train.jsonl")
    run.add_argument("--test", required=True, help="GSM8K's test.jsonl")
    run.add_argument("--text", help="local file of the calibration text, WikiText-2's valid.txt")
    run.add_argument("--bits", type=int, default=2)
    run.add_argument("--group", type=int, default=64)
    run.add_argument("--budget", type=float, default=0.042, help="entries as a share of the weights")
    run.add_argument("--samples", type=int, default=64)
    run.add_argument("--length", type=int, default=1024)
    run.add_argument("--rows", help="names of rows, separated by ;")
    run.add_argument("--lrs", default="1e-4,3e-4,1e-3")
    run.add_argument("--epochs", default="1,3")
    run.add_argument("--seeds", default="0,1")
    run.add_argument("--rows-per-step", type=int, default=12, help="packed rows of 512 tokens an optimizer step")
    run.add_argument("--generate", type=int, default=512, help="answers generated together")
    run.add_argument("--train-limit", type=int)
    run.add_argument("--test-limit", type=int)
    run.add_argument(
        "--work", default="/tmp/qwha-bench-tuning", help="folder for bases and values; what is there is not done again"
    )
    run.add_argument("--commit", default="not known", help="to be noted")
    run.add_argument("--out", required=True)
    shown = commands.add_parser("table", help="print the table")
    shown.add_argument("results", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(arguments.results))
    else:
        Study(arguments).run()


if __name__ == "__main__":
    main()
