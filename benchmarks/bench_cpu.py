"""A training step of the demo's model on a CPU, in any version of the package: run it with each version's src first on the path.

    PYTHONPATH=OLD/src python benchmarks/bench_cpu.py; PYTHONPATH=NEW/src python benchmarks/bench_cpu.py

SmolLM2-135M with rounded 2-bit codes in the Hadamard basis and entries at random places; forward, loss, backward and AdamW of 4
x 128 random tokens, all labelled, float32. Prints the median and the fastest of --steps after two; times say something only
side by side.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from qwha_cli.adapters.build import add_adapter
from qwha_cli.adapters.spectral.places import random_rows
from qwha_cli.kernels.wht import wht
from qwha_cli.models.load import load
from qwha_cli.models.targets import find_targets
from qwha_cli.models.token_loss import token_losses
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import PackedWeight, QuantFormat
from qwha_cli.quant.swap import get_linear, replace

GROUP = 64


def rounded(linear: nn.Linear) -> QuantizedLinear:
    """Codes of the transformed weight by rounding between the extremes of a group."""
    weight = wht(linear.weight.detach().float())
    out, size = weight.shape
    grouped = weight.view(out, size // GROUP, GROUP)
    low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
    scales = ((high - low) / 3).to(torch.float16)
    zeros = (-low / scales.float()).mul(4).round().clamp(0, 15).div(4)
    codes = (grouped / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 3).to(torch.uint8).view(out, size)
    form = QuantFormat("gptq", 2, GROUP, False, "hadamard", zero_bits=4)
    return QuantizedLinear.from_packed(PackedWeight.from_codes(codes, scales, zeros, format=form))


def main() -> None:
    """Build the model, take steps, print their time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load("builtin:smollm2-135m", dtype=torch.float32).model
    names = [target.name for target in find_targets(model)]
    start = {}
    for name in names:
        linear = get_linear(model, name)
        shape = (linear.out_features, linear.in_features)
        start[name] = random_rows(shape, entries=14 * sum(shape), seed=0, name=name)
        replace(model, name, rounded(linear))
    adapted = add_adapter(model, rank=14, scale=1.0, targets=names, start=start).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 40000, (4, 128), generator=torch.Generator().manual_seed(0))
    times: list[float] = []
    loss = torch.zeros(())
    for _ in range(2 + arguments.steps):
        started = time.perf_counter()
        loss = token_losses(adapted, {"input_ids": ids, "labels": ids}).losses.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    kept = times[2:]
    print(f"median {statistics.median(kept):.3f} s, fastest {min(kept):.3f} s a step, last loss {float(loss.detach()):.5f}")


if __name__ == "__main__":
    main()
