"""Norms and gated activations done in the transform's pass over memory, against a copy and against the steps one by one.

    python benchmarks/bench_fused_wht.py run  --out run.jsonl      # the cuts in use, beside torch's or Liger's steps one by one
    python benchmarks/bench_fused_wht.py tune --out tune.jsonl     # the candidates of bench_wht.py for the sizes of two models

Needs a CUDA device. bfloat16, 8,192 rows. Times as timing.py says; what must be read and written counts once; `share` is of
a copy's bandwidth in the same run. `apart_us` is the same result by a norm or activation (Liger's where installed, else torch's),
an addition and the transform, each a kernel of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from bench_wht import candidates as alone
from bench_wht import in_parts
from machine import current_commit
from timing import copy_bandwidth, graph_us, num_copies
from torch import Tensor

from qwha_cli.kernels import fused_wht_triton, gate_wht_triton, wht_triton
from qwha_cli.kernels.fp8 import E4M3, Fp8Matrix
from qwha_cli.kernels.wht import wht
from qwha_cli.kernels.wht_tiles import Tiles, fused_tiles_for

DTYPE = torch.bfloat16
ROWS = 8192
# hidden and feed-forward sizes of Llama-3.2-3B, Llama-3.1-8B, Llama-3.2-1B, Qwen2.5-0.5B
EIGHT = ", 8 bits"
NORMS, GATES = "3072,4096,2048,896", "8192,14336,4864"
# Qwen's and Llama-3.1-8B's feed-forward sizes, whose rows are wide or whose base is no power of two
_MORE = {
    14336: [
        *(Tiles(28, 2, 256, 32, "warp", 1, warps) for warps in (4, 8, 16)),
        *(Tiles(56, 1, 256, 64, "warp", rows, warps) for rows in (1, 2) for warps in (4, 8, 16)),
        *(Tiles(28, 2, 256, 32, "exchange", 1, warps) for warps in (4, 8, 16)),
        *(Tiles(56, 4, 64, 64, "dot", 1, warps, programs) for warps in (4, 8) for programs in (None, 264, 528)),
        *(Tiles(112, 2, 64, 128, "dot", 1, warps, programs) for warps in (4, 8) for programs in (None, 264)),
        *(Tiles(56, 2, 128, 64, "dot", 1, warps) for warps in (4, 16)),
        Tiles(28, 8, 64, 32, "dot", 1, 4),
    ],
    2048: [
        *(Tiles(1, 8, 256, 1, "warp", rows, rows) for rows in (1, 2, 4)),
        *(Tiles(8, 1, 256, 16, "warp", 1, warps) for warps in (2, 4)),
        Tiles(8, 1, 256, 16, "warp", 2, 4),
        Tiles(32, 1, 64, 32, "dot", 2, 4),
    ],
    4864: [
        *(Tiles(76, 1, 64, 128, "dot", rows, warps) for rows in (1, 2) for warps in (4, 8)),
        *(Tiles(76, 1, 64, 128, "dot", 1, warps, 528) for warps in (4, 8)),
        *(Tiles(76, 1, 64, chunk, "dot", 1, 4) for chunk in (16, 32)),
    ],
    9728: [
        *(Tiles(76, 2, 64, 128, "dot", 1, warps) for warps in (4, 8)),
        *(Tiles(76, 1, 128, chunk, "dot", 1, warps) for chunk in (32, 128) for warps in (4, 8)),
        *(Tiles(76, 2, 64, 16, "dot", 1, warps) for warps in (4, 8)),
    ],
    8960: [*(Tiles(140, 1, 64, chunk, "dot", 1, warps) for chunk in (32, 256) for warps in (4, 8))],
    11008: [*(Tiles(172, 1, 64, chunk, "dot", 1, warps) for chunk in (32, 256) for warps in (8, 16))],
}
# a compiler's fault, not a rounding: 8-bit numbers of two cuts are 0.014 apart
_FARTHEST = 0.05
# tensors of the rows' size that are read and written
MOVED = {"norm": 2, "norm of a sum": 4, "norm, backward": 5, "gate": 3, "gate, backward": 5}
# where the transform is in 8 bits
MOVED |= {op + EIGHT: MOVED.get(op, 2) - 0.5 for op in ("transform", "norm", "norm of a sum", "norm, backward", "gate")}


def candidates(size: int) -> list[Tiles]:
    """The cuts worth measuring."""
    found = list(_MORE.get(size) or alone(size))
    # as many programs as fit at once, where one has more registers than most
    return found + [replace(tiles, programs=396) for tiles in found if tiles.programs == 528]


def _chosen(op: str, size: int) -> Tiles:
    return fused_tiles_for(op.removesuffix(EIGHT), size, fp8=op.endswith(EIGHT))  # pyright: ignore


def _inputs(op: str, size: int) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    counts = {"transform": 1, "norm": 1, "norm of a sum": 2, "norm, backward": 4, "gate": 2, "gate, backward": 3}
    count = counts[op.removesuffix(EIGHT)]
    found = [torch.randn(ROWS, size, device="cuda", dtype=DTYPE, generator=generator) for _ in range(count)]
    if op == "norm, backward" + EIGHT:
        found[1] = found[1].to(E4M3)
    return tuple(found)


def fused(op: str, t: tuple[Tensor, ...], weight: Tensor, scales: Tensor, tiles: Tiles | None) -> object:
    """The op in one pass."""
    fp8 = op.endswith(EIGHT)
    match op.removesuffix(EIGHT):
        case "transform":
            return wht_triton.wht_fp8(t[0], tiles=tiles or fused_tiles_for("transform", t[0].shape[1], fp8=True))
        case "norm" | "norm of a sum":
            add = t[1] if len(t) > 1 else None
            return fused_wht_triton.norm_forward(t[0], add, weight, eps=1e-5, dtype=DTYPE, fp8=fp8, tiles=tiles)
        case "norm, backward":
            z = Fp8Matrix(t[1], scales) if fp8 else t[1]
            return fused_wht_triton.norm_backward(t[:1], z, t[2], weight, scales, t[3], tiles=tiles)
        case "gate":
            return gate_wht_triton.gate_forward(t[0], t[1], dtype=DTYPE, fp8=fp8, tiles=tiles)
        case _:
            return gate_wht_triton.gate_backward(t[0], t[1], t[2], tiles=tiles)


def apart(op: str, t: tuple[Tensor, ...], weight: Tensor, scales: Tensor) -> object:
    """The op by kernels of their own."""
    liger = importlib.util.find_spec("liger_kernel") is not None
    if op.startswith("gate"):
        if liger:
            from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward  # pyright: ignore

            if op == "gate":
                return wht(swiglu_forward(t[0], t[1])[2])
            return swiglu_backward(t[1], t[2], wht(t[0], transpose=True))
        return wht(torch.nn.functional.silu(t[0]) * t[1]) if op == "gate" else None
    if liger:
        from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward  # pyright: ignore
        from liger_kernel.ops.utils import calculate_settings  # pyright: ignore

        if op == "norm, backward":
            dy = wht(t[0], transpose=True)
            launch = calculate_settings(weight.numel())
            return rms_norm_backward(dy, t[2], weight, scales, 0.0, 0, *launch, False, None, False)[0] + t[3]
        h = t[0] + t[1] if len(t) > 1 else t[0]
        return wht(rms_norm_forward(h, weight, 1e-5, 0.0, "llama", None)[0])
    h = t[0] + t[1] if len(t) > 1 else t[0]
    return wht(torch.nn.functional.rms_norm(h, (h.shape[1],), weight, 1e-5)) if op != "norm, backward" else None


def distance(op: str, size: int, tiles: Tiles) -> float:
    """How far a cut's results are from those of the cut in use, which the tests hold against float64: relative, the largest."""
    t = tuple(x[:300].contiguous() for x in _inputs(op, size))
    weight, scales = torch.ones(size, device="cuda", dtype=DTYPE), torch.ones(300, device="cuda")
    one, other = (_dense(fused(op, tuple(x.clone() for x in t), weight, scales, cut)) for cut in (None, tiles))
    return max(float((a - b).norm() / a.norm()) for a, b in zip(one, other, strict=True))


def _dense(results: object) -> list[Tensor]:
    found = results if isinstance(results, tuple) else (results,)
    return [(x.dense(torch.float32) if isinstance(x, Fp8Matrix) else x).double() for x in found]  # pyright: ignore


def measure(op: str, size: int, tiles: Tiles | None, *, bandwidth: float, with_apart: bool) -> dict[str, object]:
    """A line."""
    nbytes = MOVED[op] * ROWS * size * DTYPE.itemsize
    line: dict[str, object] = {"op": op, "size": size, "rows": ROWS, "tiles": asdict(tiles or _chosen(op, size))}  # pyright: ignore
    copies = [_inputs(op, size) for _ in range(num_copies(nbytes))]
    weight, scales = torch.ones(size, device="cuda", dtype=DTYPE), torch.ones(ROWS, device="cuda")

    def timed(call: Callable[[tuple[Tensor, ...]], object]) -> float:
        return graph_us([lambda t=t: call(t) for t in copies])  # pyright: ignore

    try:
        if tiles is not None and not (line.setdefault("distance", distance(op, size, tiles)) < _FARTHEST):  # pyright: ignore
            return line | {"failed": "wrong numbers"}
        line["us"] = timed(lambda t: fused(op, t, weight, scales, tiles))
        line["share"] = nbytes / (float(line["us"]) * 1e-6) / bandwidth  # pyright: ignore
    except Exception as error:
        line["failed"] = f"{type(error).__name__}: {str(error)[:100]}"
        return line
    if with_apart and not op.endswith(EIGHT):
        try:
            line["apart_us"] = timed(lambda t: apart(op, t, weight, scales))
        except Exception as error:
            line["apart_failed"] = f"{type(error).__name__}: {str(error)[:100]}"
    return line


def run(a: argparse.Namespace) -> None:
    """Time the cuts in use."""
    bandwidth = copy_bandwidth("cuda")
    for op, size in _cases(a):
        _write(a.out, measure(op, size, None, bandwidth=bandwidth, with_apart=True) | {"commit": a.commit})


def tune(a: argparse.Namespace) -> None:
    """Time every candidate, the best of each last."""
    in_parts(a.workers, __file__, "compile", "--out", os.devnull, "--norms", a.norms, "--gates", a.gates, "--ops", a.ops)
    bandwidth = copy_bandwidth("cuda")
    for op, size in _cases(a):
        lines = [measure(op, size, tiles, bandwidth=bandwidth, with_apart=False) for tiles in candidates(size)]
        for line in sorted(lines, key=lambda line: float(line.get("share", 0.0))):  # pyright: ignore
            _write(a.out, line | {"commit": a.commit})


def _cases(a: argparse.Namespace) -> list[tuple[str, int]]:
    sizes = {"norm": a.norms, "gate": a.gates, "tran": a.norms}
    ops = [op for op in MOVED if a.ops == "all" or op.endswith(EIGHT) == (a.ops == "8 bits")]
    return [(op, int(size)) for op in ops for size in sizes[op[:4]].split(",") if size]


def compile_candidates(a: argparse.Namespace) -> None:
    """Launch every so-many-th candidate once, which leaves it in Triton's cache."""
    index, count = (int(number) for number in a.part.split("/"))
    every = [(op, size, tiles) for op, size in _cases(a) for tiles in candidates(size)]
    for op, size, tiles in every[index::count]:
        t = tuple(x[:16].contiguous() for x in _inputs(op, size))
        try:
            fused(op, t, torch.ones(size, device="cuda", dtype=DTYPE), torch.ones(16, device="cuda"), tiles)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{op} {size} {tiles}: {type(error).__name__}", file=sys.stderr)


def _write(out: Path, line: dict[str, object]) -> None:
    line["device"] = torch.cuda.get_device_name()
    text = json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in line.items()})
    print(text, flush=True)
    with out.open("a") as file:
        file.write(text + "\n")


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tune", "run", "compile"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--norms", default=NORMS, help="sizes of rows that are normed")
    parser.add_argument("--gates", default=GATES, help="sizes of rows that are gated")
    parser.add_argument("--ops", choices=("all", "8 bits", "16 bits"), default="all", help="those with so many bits a number")
    parser.add_argument("--part", help="of compile: I/N, every N-th case from the I-th on, in this process")
    parser.add_argument("--workers", type=int, default=max(1, min(14, os.cpu_count() or 1)), help="processes that compile")
    parser.add_argument("--commit", default=current_commit())
    a = parser.parse_args()
    if a.command == "compile":
        compile_candidates(a)
    elif a.command == "tune":
        tune(a)
    else:
        run(a)


if __name__ == "__main__":
    main()
