"""Tokens a second of training on 1, 2, ... GPUs, and whether the loss is the same: the product's Engine on a model of real size.

    python benchmarks/bench_ddp.py                      # Llama-3.2-3B's shape, 1 and 2 GPUs
    python benchmarks/bench_ddp.py --gpus 1 2 4 8
    python benchmarks/bench_ddp.py --tiny               # a smoke test: CPU, gloo, a minute

Random 2-bit codes in the Hadamard basis, adapters of rank 64's budget at random places: time and memory are those of a real
model, losses are not. Each GPU gets 16 sequences of 512 tokens, checkpointing on, so the step grows with the GPUs. The loss curve
is of one step size for all: 16 sequences shared by the GPUs. Prints JSON lines. Starts torchrun by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import torch
from torch import nn

from qwha_cli.adapters.build import add_adapter
from qwha_cli.data.tokenize import Encoded
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.models.random import random_config
from qwha_cli.models.stream import make_skeleton
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import PackedWeight, QuantFormat
from qwha_cli.quant.swap import replace
from qwha_cli.training.batches import Batches
from qwha_cli.training.engine import Engine
from qwha_cli.training.settings import TrainSettings

WARM_UP, TIMED, CURVE = 3, 6, 20


def random_model(shape: str, *, rank: int, device: torch.device) -> nn.Module:
    """A model of a shape with random codes and a random adapter, the same on every rank."""
    config = random_config(shape)
    config.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_skeleton(config, shape)
    generator = torch.Generator(device).manual_seed(0)
    form = QuantFormat("rtn", 2, 64 if config.hidden_size % 64 == 0 else 16, False, "hadamard", zero_bits=4)
    starts: dict[str, SparseRows] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            size = (module.out_features, module.in_features)
            replace(model, name, QuantizedLinear.from_packed(random_codes(form, size, generator)))
            starts[name] = random_entries(size, rank=rank, generator=generator)
    for name, parameter in list(model.named_parameters()):
        value = torch.randn(parameter.shape, generator=generator, device=device) * 0.02
        owner, _, leaf = name.rpartition(".")
        value = 1 + value if parameter.dim() == 1 else value
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value.to(config.dtype), requires_grad=False))
    model.tie_weights()
    model.to(device)
    return add_adapter(model, rank=rank, scale=1.0, targets=list(starts), start=starts)


def random_codes(form: QuantFormat, size: tuple[int, int], generator: torch.Generator) -> PackedWeight:
    """Random bits as codes and zeros, scales that give weights of 0.02."""
    device = generator.device
    tensors: dict[str, torch.Tensor] = {}
    for key, (shape, dtype) in form.shapes(size).items():
        if dtype.is_floating_point:
            tensors[key] = (torch.rand(shape, generator=generator, device=device) * 0.01 + 0.01).to(dtype)
        else:
            bits = torch.iinfo(dtype)
            tensors[key] = torch.randint(bits.min, bits.max, shape, generator=generator, device=device, dtype=dtype)
    return PackedWeight(tensors, form, size)


def random_entries(size: tuple[int, int], *, rank: int, generator: torch.Generator) -> SparseRows:
    """As many entries in each row, rank · (in + out) in all."""
    a_row = max(1, rank * sum(size) // size[0])
    noise = torch.rand(size, generator=generator, device=generator.device)
    columns = noise.topk(min(a_row, size[1]), dim=1).indices.sort(dim=1).values
    places = (columns + torch.arange(size[0], device=columns.device)[:, None] * size[1]).reshape(-1).int()
    values = torch.randn(len(places), generator=generator, device=places.device) * 1e-3
    return SparseRows.from_flat(places, values, shape=size)


def examples(count: int, length: int) -> list[Encoded]:
    """Random tokens, all of them to be learnt."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 250, (count, length), generator=generator).tolist()
    return [Encoded(input_ids=row, labels=row) for row in rows]


def run(model: nn.Module, data: list[Encoded], *, batch: int, steps: int, device: torch.device) -> dict[str, object]:
    """Train some steps; return losses, and seconds and tokens of those after the warm-up."""
    settings = TrainSettings(
        lr=1e-4,
        pad_id=256,
        steps=steps,
        batch_size=batch,
        checkpointing=True,
        precision="bf16" if device.type == "cuda" else "fp32",
    )
    engine = Engine(model, settings=settings)
    batches = Batches(
        data, batch_size=batch, accumulation=1, seed=0, pad_id=256, pack_to=None, rank=engine.rank, ranks=engine.ranks,
        flat=engine.flat,
    )  # fmt: skip
    losses: list[float] = []
    tokens, started = 0, 0.0
    with engine.training():
        for index in range(steps):
            if index == WARM_UP:
                _settle(device)
                tokens, started = 0, time.perf_counter()
            loss, _, read = engine.gradient(batches.step(index))
            engine.update(1e-4)
            losses.append(loss)
            tokens += read
        _settle(device)
        seconds = time.perf_counter() - started
    return {"tokens_per_s": tokens / seconds, "losses": losses, "peak_gib": engine.peak_gib(), "launch": engine.launch.reason}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def work(args: argparse.Namespace) -> None:
    """One rank: build, measure, write what the first rank saw."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu" if args.tiny else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    began = time.perf_counter()
    model = random_model("tiny-llama" if args.tiny else "llama-3.2-3b", rank=2 if args.tiny else 64, device=device)
    own, length = (4, 32) if args.tiny else (16, 512)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    built = time.perf_counter() - began
    data = examples(own * 8 * CURVE, length)
    rate = run(model, data, batch=own * ranks, steps=WARM_UP + TIMED, device=device)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    curve = run(model, data, batch=own, steps=CURVE, device=device)
    if rank == 0:
        found = {
            "gpus": ranks,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "sequences_a_gpu": own,
            "length": length,
            "trained_values": sum(p.numel() for p in trained.values()),
            "tokens_per_s": round(cast(float, rate["tokens_per_s"]), 1),
            "peak_gib": round(cast(float, rate["peak_gib"]), 2),
            "built_s": round(built, 1),
            "launch": rate["launch"],
            "losses": curve["losses"],
        }
        Path(args.result).write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """Run every number of GPUs, one after the other, and compare them with the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tiny", action="store_true", help="a smoke test on the CPU")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result:
        work(args)
        return
    first: dict[str, object] = {}
    for gpus in args.gpus:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
            command = [sys.executable, *launcher, __file__, "--result", str(result), *(["--tiny"] if args.tiny else [])]
            began = time.perf_counter()
            subprocess.run(command, check=True)
            found = json.loads(result.read_text()) | {"wall_s": round(time.perf_counter() - began, 1)}
        first = first or found
        pairs = zip(cast("list[float]", first["losses"]), cast("list[float]", found["losses"]), strict=True)
        found["speedup"] = round(found["tokens_per_s"] / cast(float, first["tokens_per_s"]), 3)
        found["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
