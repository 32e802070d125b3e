"""Time and memory of a training step as sequences, tokens and parameters grow: the rows of bench_step.py along three sweeps.

    python benchmarks/bench_memory.py run --out results/sweeps.jsonl                                # all rows, all sweeps
    python benchmarks/bench_memory.py run --sweep batch --rows "QLoRA;ours, hadamard" --out results/sweeps.jsonl

    batch     1, 2, 4, 8, 16 sequences of 512 tokens, Llama-3.2-3B's shape
    length    one sequence of 512, 1024, 2048, 4096, 8192 tokens, the same shape
    model     one sequence of 512 tokens, shapes of 0.5 to 8 billion parameters

All with checkpointing on. What a step is, and that its time is the median after a warm-up, are bench_step's. `peak_gib` is the
most that torch's allocator held during the warm-up and the steps, model included, without an optimizer; `resident_gib` what the
model alone holds. A model is built once for all its points, and a point that two sweeps share is measured once. Out of memory, or
a missing package, is a line on the screen, and the next point follows.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from bench_step import FP8, ROWS, Step, measure
from machine import current_commit
from sweeps import SHAPE, SWEEPS, Line, Point, by_shape
from torch import nn

DEFAULT_ROWS = ";".join(name for name in ROWS if ", keep " not in name)


def run(a: argparse.Namespace) -> None:
    """Measure each row on each model and append a line a point."""
    for name in a.rows.split(";"):
        for shape, points in by_shape(a.sweep, shape=a.shape).items():
            take_all(name, points, argparse.Namespace(**{**vars(a), "shape": shape}))
            # the model is gone only now, with the frame that held it
            release()


def take_all(name: str, points: list[Point], a: argparse.Namespace) -> None:
    """Build a row's model of the shape `a.shape`, and measure its points."""
    started = time.monotonic()
    try:
        model = ROWS[name](a)
    except Exception as error:
        tell(f"{name}, {a.shape}", error)
        return
    built = round(time.monotonic() - started, 1)
    # what building left behind is not the model's
    release()
    resident = torch.cuda.memory_allocated() / 2**30
    for point in points:
        try:
            found = take(model, point, a, fp8=name.startswith(FP8))
        except Exception as error:
            tell(f"{name}, {a.shape}, {point.batch} x {point.length}", error)
        else:
            line = {
                "row": name, "shape": point.shape, "case": point.case, "length": point.length, "rank": a.rank,
                "loss_kernels": a.loss, **found, "resident_gib": round(resident, 3), "built_s": built,
                "commit": a.commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            }  # fmt: skip
            write(line, a.out)
        # an error leaves the gradients that it had, and its activations until they are collected
        for parameter in model.parameters():
            parameter.grad = None
        release()


def take(model: nn.Module, point: Point, a: argparse.Namespace, *, fp8: bool) -> dict[str, float | str]:
    """Milliseconds, peak memory, loss and way of launching of a point's step."""
    step = Step(model, length=point.length, liger=a.loss == "liger", device=a.device, fp8=fp8)
    # the pool of the last point's graph is given back only when nothing is cached
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with step.case(point.batch, True) as call:
        ms, loss = measure(call, warmup=a.warmup, steps=a.steps)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"ms": round(ms, 2), "peak_gib": round(peak, 3), "loss": round(loss, 4), "launch": step.launch}


def write(line: Line, out: Path) -> None:
    """Show a line and append it."""
    text = json.dumps(line)
    print(text, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(text + "\n")


def tell(what: str, error: Exception) -> None:
    """Say on the screen what could not be measured, and why."""
    print(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)


def release() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure")
    command.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    command.add_argument("--rows", default=DEFAULT_ROWS, help="names of bench_step.ROWS, separated by ;")
    command.add_argument("--shape", default=SHAPE, help="of models/random.py, for the sweeps over sequences and tokens")
    command.add_argument("--rank", type=int, default=64)
    command.add_argument("--warmup", type=int, default=2)
    command.add_argument("--steps", type=int, default=5)
    command.add_argument("--loss", choices=("liger", "plain"), default="liger")
    command.add_argument("--device", default="cuda")
    command.add_argument("--commit", default=current_commit())
    command.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    unknown = [name for name in a.rows.split(";") if name not in ROWS]
    if unknown:
        parser.error(f"no such rows: {', '.join(unknown)}; there are: {'; '.join(ROWS)}")
    torch.manual_seed(0)
    run(a)


if __name__ == "__main__":
    main()
