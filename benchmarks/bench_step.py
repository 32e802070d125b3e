"""Time and memory of a training step: the product in both bases beside its rivals, same tokens, attention and Liger kernels.

    python benchmarks/bench_step.py run --shape llama-3.2-3b --out docs/results/data/step.jsonl
    python benchmarks/bench_step.py profile --row "ours, hadamard" --out profile
    python benchmarks/bench_step.py table docs/results/data/step.jsonl

A step is forward, loss and backward of random tokens under bfloat16 autocast, all of them labelled; no optimizer, whose time is
the same for equal numbers of trained values. All rows get the product's own step: sequences end to end under torch's
attention, Liger's kernels, and --launch graph records forward and backward as a CUDA graph (a row that cannot be recorded is
launched one by one, and says so in its line), --launch eager launches kernels one by one as peft and transformers do. Median
of --steps after --warmup. Peak memory is the device's, with the model, without an optimizer. Rows: `official` is the published
layer's arithmetic on a 2-bit base, in the paper's form and in its authors' later one (published.py), QLoRA is bitsandbytes' NF4
under peft, `full` trains all linear layers in bfloat16 without an adapter: the same matrix products as ours. Our rows keep dense
weights as `train.keep: auto` does on a GPU without room for all of them, a block's with checkpointing and none without, but for
those that say what they keep. With 8-bit embeddings the loss makes some thousand words dense at a time. --loss plain takes
transformers' own kernels for every row.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from machine import current_commit
from published import PublishedLinear, PublishedTransformedLinear
from shape_models import (
    DTYPE,
    dense_model,
    exchange,
    linears,
    quantized_model,
    random_packed,
    random_rows,
    with_lora,
    with_sparse_adapter,
)
from torch import nn

from qwha_cli.adapters.adapted_linear import adapted_layers
from qwha_cli.adapters.fp8 import choose_fp8, fp8_products
from qwha_cli.adapters.fused_blocks import choose_fused_blocks, fused_blocks
from qwha_cli.adapters.keep import set_keep
from qwha_cli.data.flatten import FlatShape, flat_batch
from qwha_cli.data.tokenize import Encoded
from qwha_cli.models.liger import FusedHead, apply_to_layers, choose_kernels, fused_head
from qwha_cli.models.token_loss import causal_model, summed_loss
from qwha_cli.models.varlen import varlen_attention
from qwha_cli.training.step_graphs import CannotRecord, StepGraphs

ONE_BY_ONE, PLAIN = ", kernels one by one", ", transformers' layers and loss"
FP8 = "ours, hadamard, fp8"
CASES = {"16 on": (16, True), "16 off": (16, False), "1 on": (1, True), "1 off": (1, False), "4 on": (4, True)}


def _group(a: argparse.Namespace) -> int:
    return 16 if a.shape.startswith("tiny") else 64


def _ours(basis: str, keep: str = "block", *, embedding_bits: int = 16) -> Callable[[argparse.Namespace], nn.Module]:
    def build(a: argparse.Namespace) -> nn.Module:
        how = {"group": _group(a), "basis": basis, "device": a.device}
        base = quantized_model(a.shape, bits=2, embedding_bits=embedding_bits, **how)  # pyright: ignore
        model = with_sparse_adapter(base, rank=a.rank, device=a.device)
        set_keep(model, keep)  # pyright: ignore
        return model

    return build


def _low_rank(a: argparse.Namespace) -> nn.Module:
    model = with_lora(quantized_model(a.shape, bits=2, group=64, basis="weight", device=a.device), rank=a.rank)
    set_keep(model, "block")
    return model


def _official(kind: type[PublishedLinear | PublishedTransformedLinear]) -> Callable[[argparse.Namespace], nn.Module]:
    def build(a: argparse.Namespace) -> nn.Module:
        model = quantized_model(a.shape, bits=2, group=_group(a), basis="weight", device=a.device)

        def layer(old: nn.Module) -> nn.Module:
            size = (cast(int, old.out_features), cast(int, old.in_features))
            packed = random_packed(size, bits=2, group=_group(a), basis="weight", device=a.device, zero_bits=2)
            return kind(packed, random_rows(size, rank=a.rank, device=a.device))

        exchange(model, layer)
        return model

    return build


def _qlora(a: argparse.Namespace) -> nn.Module:
    import bitsandbytes

    model = dense_model(a.shape, device="cpu" if a.shape.startswith("tiny") else a.device)

    def layer(old: nn.Linear) -> nn.Module:
        made = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=DTYPE, quant_type="nf4", compress_statistics=True
        )
        made.weight = bitsandbytes.nn.Params4bit(old.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        return made.to(a.device)

    exchange(model, layer)
    return with_lora(model.to(a.device), rank=a.rank)  # pyright: ignore


def _full(a: argparse.Namespace) -> nn.Module:
    model = dense_model(a.shape, device=a.device)
    for layer in linears(model).values():
        layer.requires_grad_(True)
    return model


ROWS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
    "official": _official(PublishedLinear),
    "official, transformed base": _official(PublishedTransformedLinear),
    "QLoRA": _qlora,
    "LoRA on 2 bits": _low_rank,
    "LoRA on bf16": lambda a: with_lora(dense_model(a.shape, device=a.device), rank=a.rank),
    "full bf16": _full,
    "ours, hadamard": _ours("hadamard"),
    "ours, weight": _ours("weight"),
    "ours, hadamard, keep memory": _ours("hadamard", "memory"),
    "ours, hadamard, keep speed": _ours("hadamard", "speed"),
    FP8: _ours("hadamard"),
    f"{FP8}, keep speed": _ours("hadamard", "speed"),
    "ours, hadamard, 8-bit embeddings": _ours("hadamard", embedding_bits=8),
    "ours, hadamard, 8-bit embeddings, keep memory": _ours("hadamard", "memory", embedding_bits=8),
}


class Step:
    """A model ready to take steps.

    Args:
        model: With everything that is trained requiring a gradient.
        length: Tokens a sequence.
        liger: Whether to use Liger's kernels.
        device: Of the model.
        launch: Whether to record forward and backward.
        apart: Whether to leave norms and activations in the Hadamard basis to Liger, as in the other rows.
        fp8: Whether to multiply 8-bit numbers, as `train.precision: fp8` does.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        length: int,
        liger: bool,
        device: str,
        launch: str = "graph",
        apart: bool = False,
        fp8: bool = False,
    ) -> None:
        self.model = model
        self.causal = causal_model(model)
        self.length, self.device, self.launch = length, torch.device(device), launch
        choice = choose_kernels("liger" if liger else "torch", model=self.causal, device=self.device)
        if choice.layers:
            apply_to_layers(self.causal)
        self.fused = choice.loss
        self.fp8 = choose_fp8(model, wanted=fp8)
        self.blocks = choose_fused_blocks(self.causal, wanted=liger and not apart, device=self.device, dtype=DTYPE).fused
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.block = any(layer.keep == "block" for layer in adapted_layers(model).values())

    @contextlib.contextmanager
    def case(self, batch: int, checkpointing: bool) -> Iterator[Callable[[], torch.Tensor]]:
        """Give the function that takes a step; `launch` says afterwards how its kernels were launched."""
        ids = torch.randint(0, self.causal.config.vocab_size, (batch, self.length)).tolist()
        data = flat_batch([Encoded(row, row) for row in ids], pad_id=0, shape=FlatShape(self.length))
        count = len(data["places"])
        data = {name: tensor.pin_memory() for name, tensor in data.items()}
        if checkpointing:
            how = {"use_reentrant": False, "preserve_rng_state": False}
            self.causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            # as training does: the frozen embeddings' output needs no gradient
            self.causal.disable_input_require_grads()
        else:
            self.causal.gradient_checkpointing_disable()
        if self.block:
            # as choose_keep has it: nothing is recomputed, and the weights of all layers would stay
            set_keep(self.model, "block" if checkpointing else "memory")
        self.model.train()
        with contextlib.ExitStack() as stack:
            stack.enter_context(varlen_attention(self.causal))
            stack.enter_context(fp8_products(self.fp8))
            if self.blocks:
                stack.enter_context(fused_blocks(self.causal))
            head: FusedHead | None = stack.enter_context(fused_head(self.causal)) if self.fused else None

            def passes(batch: Mapping[str, torch.Tensor], equal: int | None) -> torch.Tensor:
                with torch.autocast(self.device.type, dtype=DTYPE):
                    loss = summed_loss(self.model, batch, head=head, longest=self.length, equal=equal) / count
                loss.backward()
                return loss.detach()

            def one_by_one() -> torch.Tensor:
                loss = passes({name: tensor.to(self.device, non_blocking=True) for name, tensor in data.items()}, self.length)
                for parameter in self.trained:
                    parameter.grad = None
                return loss

            stack.callback(_give_workspaces_back)
            if self.launch == "eager":
                yield one_by_one
                return
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            graphs = StepGraphs(passes, device=self.device)

            def recorded() -> torch.Tensor:
                if self.launch == "eager":
                    return one_by_one()
                torch._foreach_zero_([cast(torch.Tensor, parameter.grad) for parameter in self.trained])
                try:
                    return graphs(data, self.length)
                except CannotRecord as error:
                    print(f"not recorded: {error}", flush=True)
                    self.launch = "eager"
                    return one_by_one()

            try:
                yield recorded
            finally:
                graphs.clear()
                for parameter in self.trained:
                    parameter.grad = None


def _give_workspaces_back() -> None:
    """Free what cuBLAS keeps, 32 MiB for every thread and stream that has multiplied: each case has a stream of its own."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()


def measure(step: Callable[[], torch.Tensor], *, warmup: int, steps: int) -> tuple[float, float]:
    """Median milliseconds of a step, and its loss."""
    loss = torch.zeros(())
    for _ in range(warmup):
        loss = step()
    times: list[float] = []
    for _ in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times), float(loss)


def _step(row: str, a: argparse.Namespace) -> Step:
    return Step(
        ROWS[row](a),
        length=a.length,
        liger=a.loss == "liger",
        device=a.device,
        launch=a.launch,
        apart=a.apart,
        fp8=row.startswith(FP8),
    )


def run(a: argparse.Namespace) -> None:
    """Measure the rows and append a line each."""
    for name in a.rows.split(";"):
        try:
            torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            step = _step(name, a)
            built = round(time.monotonic() - started, 1)
            # what building left behind is not the model's
            gc.collect()
            torch.cuda.empty_cache()
            resident = torch.cuda.memory_allocated() / 2**30
            for case in a.cases.split(","):
                batch, checkpointing = CASES[case]
                # a graph's pool is given back only when nothing is cached
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                with step.case(batch, checkpointing) as take:
                    ms, loss = measure(take, warmup=a.warmup, steps=a.steps)
                line = {
                    "row": name, "launch": step.launch, "fused_blocks": step.blocks,
                    "shape": a.shape, "case": case, "length": a.length, "rank": a.rank, "loss_kernels": a.loss,
                    "ms": round(ms, 2), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
                    "resident_gib": round(resident, 3), "loss": round(loss, 4), "built_s": built,
                    "commit": a.commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                }  # fmt: skip
                print(json.dumps(line), flush=True)
                with Path(a.out).open("a") as out:
                    out.write(json.dumps(line) + "\n")
                # it holds the model
                del take
        except (RuntimeError, torch.OutOfMemoryError, ImportError) as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        step = None
        gc.collect()
        torch.cuda.empty_cache()


def profile(a: argparse.Namespace) -> None:
    """Where a step's time goes: a table by kernel on the terminal, and a trace."""
    step = _step(a.rows, a)
    batch, checkpointing = CASES[a.cases]
    folder = Path(a.out)
    folder.mkdir(parents=True, exist_ok=True)
    with step.case(batch, checkpointing) as take:
        measure(take, warmup=3, steps=1)
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as found:
            take()
            torch.cuda.synchronize()
    averages = found.key_averages()
    lines = [
        {"name": e.key[:160], "calls": e.count, "cuda_ms": round(e.self_device_time_total / 1e3, 3),
         "cpu_ms": round(e.self_cpu_time_total / 1e3, 3)}
        for e in averages
    ]  # fmt: skip
    lines.sort(key=lambda line: -cast(float, line["cuda_ms"]))
    (folder / f"profile-{a.rows}-{a.cases}.json".replace(" ", "-").replace(",", "")).write_text(json.dumps(lines[:80], indent=0))
    print(averages.table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=70))


def table(paths: list[str]) -> str:
    """The lines as Markdown: a row a method, milliseconds and peak memory of every case, of several lines the fastest."""
    lines = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    cases = [case for case in CASES if any(line["case"] == case for line in lines)]
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for line in sorted(lines, key=lambda line: -line["ms"]):
        how = (ONE_BY_ONE if line.get("launch") == "eager" else "") + (PLAIN if line.get("loss_kernels") == "plain" else "")
        found[(line["row"] + how, line["case"])] = line
    parts = ["| | " + " | ".join(f"{c}: ms | GiB" for c in cases) + " |", "|---|" + "---:|---:|" * len(cases)]
    for row in (row + one + plain for row in ROWS for one in ("", ONE_BY_ONE) for plain in ("", PLAIN)):
        cells = [_cell(found.get((row, c))) for c in cases]
        if any(cell[0] != "–" for cell in cells):
            parts.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(parts)


def _cell(line: dict[str, float | None] | None) -> str:
    if line is None:
        return "– | –"
    # not known where another model was in memory too
    peak = line["peak_gib"]
    return f"{line['ms']:.0f} | {'–' if peak is None else format(peak, '.1f')}"


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rows, cases in (("run", ";".join(ROWS), "16 on,16 off,1 on"), ("profile", "ours, hadamard", "16 on")):
        command = commands.add_parser(name)
        command.add_argument("--shape", default="llama-3.2-3b", help="of models/random.py")
        command.add_argument("--rows", default=rows, help="names, separated by ;")
        command.add_argument("--cases", default=cases, help=f"of {', '.join(CASES)}: sequences, and checkpointing on or off")
        command.add_argument("--length", type=int, default=512)
        command.add_argument("--rank", type=int, default=64)
        command.add_argument("--warmup", type=int, default=2)
        command.add_argument("--steps", type=int, default=5)
        command.add_argument("--loss", choices=("liger", "plain"), default="liger")
        command.add_argument("--launch", choices=("graph", "eager"), default="graph")
        command.add_argument("--apart", action="store_true", help="norms and activations by Liger in the Hadamard basis too")
        command.add_argument("--device", default="cuda")
        command.add_argument("--commit", default=current_commit())
        command.add_argument("--out", required=True)
    shown = commands.add_parser("table")
    shown.add_argument("results", nargs="+")
    a = parser.parse_args()
    if a.command == "table":
        print(table(a.results))
    else:
        torch.manual_seed(0)
        {"run": run, "profile": profile}[a.command](a)


if __name__ == "__main__":
    main()
