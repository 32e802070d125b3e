"""The transform's kernel against a copy of the same tensor: every cut that may be good, the cuts chosen, and their errors.

    python benchmarks/bench_wht.py tune  --out tune.jsonl        # all candidates of the shapes of models, bfloat16; a minute
    python benchmarks/bench_wht.py run   --out run.jsonl         # the chosen cut for some rows and dtypes, beside torch
    python benchmarks/bench_wht.py check                         # odd sizes, all dtypes, both directions, against float64

Needs a CUDA device. A time is that of a call which finds the cache cold, taken as timing.py says. GB/s counts what must be read
and written once; `share` is that of the copy's GB/s in this run. Before `tune` and `check` work, processes compile side by side
into Triton's cache: compiling takes longer than measuring.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from timing import graph_us, num_copies
from torch import Tensor

from qwha_cli.kernels import wht_triton
from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.wht import wht
from qwha_cli.kernels.wht_tiles import Tiles, tiles_for, unfit

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Llama, Qwen, Gemma, Phi; the first four have the whole list of candidates
SIZES = [3072, 4096, 8192, 14336, 2048, 5120, 11008, 18944]
CHECKED = [2, 12, 16, 48, 64, 66, 80, 96, 128, 256, 576, 736, 896, 1184, 1536, 2048, 3072, 4096, 4864, 5120, 8192, 11008, 14336]
CHECKED += [16384, 17408, 18944, 27648, 28672, 32768]
_NUMBERS = 2**26


def _both(tiles: list[Tiles]) -> Iterator[Tiles]:
    """Each cut with one group of rows a program, and with programs that stay, one or two groups on their way."""
    for cut in tiles:
        yield cut
    for cut in tiles:
        for stages in (1, 2):
            yield _with(cut, programs=132 * max(1, 16 // cut.warps), stages=stages)


def _with(cut: Tiles, **changes: object) -> Tiles:
    return Tiles(**{**asdict(cut), **changes})  # pyright: ignore[reportArgumentType]


def candidates(size: int) -> list[Tiles]:
    """The cuts worth measuring: products inside, in a warp or butterflies between lanes, orders, rows and warps."""
    d, w, e = "dot", "warp", "exchange"
    match size:
        case 3072:
            staying = [
                Tiles(12, 1, 256, 16, w, 1, 4),
                *(Tiles(48, 1, 64, 64, d, rows, warps) for rows, warps in [(1, 4), (2, 4), (2, 8)]),
            ]
            once = [
                *(Tiles(12, 1, 256, 16, w, rows, warps) for rows, warps in [(2, 4), (2, 8), (4, 8), (1, 2)]),
                Tiles(48, 1, 64, 64, d, 4, 8),
                *(Tiles(48, 1, 64, 16, d, rows, 4) for rows in (1, 2)),
                *(Tiles(24, 1, 128, 32, d, rows, 4) for rows in (1, 2, 4)),
                *(Tiles(12, 4, 64, 16, d, rows, 4) for rows in (1, 2, 4)),
                *(Tiles(12, 2, 128, 16, d, rows, 4) for rows in (2, 4)),
                *(Tiles(12, 1, 256, 16, e, rows, 4) for rows in (1, 2)),
            ]
        case 4096:
            staying = [
                Tiles(16, 1, 256, 16, w, 1, 4),
                *(Tiles(64, 1, 64, 64, d, rows, warps) for rows, warps in [(1, 4), (2, 4), (2, 8)]),
            ]
            once = [
                *(Tiles(16, 1, 256, 16, w, rows, warps) for rows, warps in [(2, 4), (2, 8), (1, 2)]),
                *(Tiles(1, 16, 256, 1, w, rows, rows) for rows in (1, 2, 4)),
                Tiles(64, 1, 64, 64, d, 4, 8),
                *(Tiles(32, 1, 128, 32, d, rows, 4) for rows in (1, 2, 4)),
                *(Tiles(32, 2, 64, 32, d, rows, 4) for rows in (1, 2)),
                *(Tiles(16, 4, 64, 16, d, rows, 4) for rows in (1, 2, 4)),
                *(Tiles(16, 2, 128, 16, d, rows, 4) for rows in (2, 4)),
                *(Tiles(16, 1, 256, 16, e, rows, 4) for rows in (1, 2)),
                Tiles(1, 16, 256, 1, e, 4, 4),
                Tiles(1, 16, 256, 1, e, 2, 2),
            ]
        case 8192:
            staying = [
                Tiles(32, 1, 256, 32, w, 1, 8),
                *(Tiles(64, 2, 64, 64, d, 1, warps) for warps in (4, 8)),
                *(Tiles(64, 1, 128, 64, d, 1, warps) for warps in (4, 8)),
            ]
            once = [
                Tiles(32, 1, 256, 32, w, 1, 4),
                *(Tiles(16, 2, 256, 16, w, 1, warps) for warps in (2, 4, 8)),
                *(Tiles(64, tiles, 128 // tiles, 64, d, 2, 8) for tiles in (1, 2)),
                *(Tiles(32, 4, 64, 32, d, rows, warps) for rows, warps in [(1, 4), (1, 8), (2, 4)]),
                *(Tiles(32, 2, 128, 32, d, rows, 4) for rows in (1, 2)),
                *(Tiles(16, 8, 64, 16, d, 1, warps) for warps in (4, 8)),
                *(Tiles(32, 1, 256, 32, e, 1, warps) for warps in (4, 8)),
                Tiles(16, 2, 256, 16, e, 1, 4),
            ]
        case 14336:
            staying = [
                Tiles(28, 2, 256, 32, w, 1, 8),
                *(Tiles(*cut, d, 1, warps) for *cut, warps in [(112, 2, 64, 128, 8), (56, 4, 64, 64, 8), (28, 8, 64, 32, 4)]),
            ]
            once = [
                *(Tiles(28, 2, 256, 32, w, 1, warps) for warps in (4, 16)),
                *(Tiles(56, 1, 256, 64, w, 1, warps) for warps in (4, 8, 16)),
                Tiles(112, 2, 64, 128, d, 1, 4),
                Tiles(112, 1, 128, 128, d, 1, 8),
                Tiles(56, 4, 64, 64, d, 1, 4),
                Tiles(56, 2, 128, 64, d, 1, 8),
                Tiles(28, 8, 64, 32, d, 1, 8),
                *(Tiles(28, 4, 128, 32, d, 1, warps) for warps in (4, 8)),
                *(Tiles(28, 2, 256, 32, e, 1, warps) for warps in (4, 8)),
            ]
        case 11008:
            staying, once = [], [Tiles(172, 1, 64, chunk, d, 1, warps) for chunk, warps in [(32, 4), (32, 8), (64, 8)]]
        case 18944:
            staying, once = [], [Tiles(148, *cut, d, 1, 8) for cut in [(2, 64, 32), (1, 128, 32), (2, 64, 64)]]
        case 5120:
            staying = [Tiles(20, 1, 256, 32, w, 1, 4)]
            once = [Tiles(20, 1, 256, 32, w, 2, 8), *(Tiles(*cut, d, 1, 4) for cut in [(40, 2, 64, 64), (20, 4, 64, 32)])]
        case 2048:
            staying = [Tiles(1, 8, 256, 1, w, 1, 1)]
            once = [*(Tiles(1, 8, 256, 1, w, n, n) for n in (2, 4)), *(Tiles(32, 1, 64, 32, d, n, 4) for n in (1, 2, 4))]
        case _:
            staying, once = [], [tiles_for(size)]
    return [*_both(staying), *once]


def _exact(x: Tensor, transpose: bool) -> Tensor:
    """float64, in the torch form, which the tests hold against the dense matrix."""
    return wht(x.double(), transpose=transpose, backend="torch")


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def measure(size: int, rows: int, dtype: str, tiles: Tiles, *, with_torch: bool, add: bool = False) -> dict[str, object]:
    """One line: time, bandwidth, share of the copy's, error."""
    x = torch.randn(rows, size, device="cuda", dtype=torch.float32).to(DTYPES[dtype])
    nbytes = x.numel() * x.element_size()
    inputs = [x, *(x.clone() for _ in range(num_copies(2 * nbytes) - 1))]
    pairs = [(own, torch.randn_like(own) if add else None) for own in inputs]
    line: dict[str, object] = {"n": size, "rows": rows, "dtype": dtype, "add": add, "tiles": asdict(tiles)}
    try:
        found = wht_triton.wht(x[:16], None, transpose=False, tiles=tiles)
        line["error"] = _error(found, _exact(x[:16], False))
        ms = graph_us([partial(wht_triton.wht, *pair, transpose=False, tiles=tiles) for pair in pairs]) / 1e3
    except Exception as error:
        # a candidate that does not compile or needs too much memory is a result too
        return {**line, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
    copy = graph_us([partial(torch.clone, own) for own in inputs]) / 1e3
    moved = (3 if add else 2) * nbytes
    line |= {"ms": ms, "gb_s": moved / ms / 1e6, "copy_ms": copy, "copy_gb_s": 2 * nbytes / copy / 1e6}
    line["share"] = line["gb_s"] / line["copy_gb_s"]  # pyright: ignore[reportOperatorIssue]
    if with_torch:
        line["torch_ms"] = graph_us([partial(wht, own, add=other, backend="torch") for own, other in pairs]) / 1e3
        line["torch_error"] = _error(wht(x[:16], backend="torch"), _exact(x[:16], False))
    return line


def tune(out: Path, workers: int) -> None:
    """Time all candidates, the best of each size last."""
    in_parts(workers, __file__, "compile")
    for size in SIZES:
        lines = [measure(size, _NUMBERS // size, "bf16", tiles, with_torch=False) for tiles in candidates(size)]
        for line in sorted(lines, key=lambda line: line.get("share", 0.0)):  # pyright: ignore[reportArgumentType,reportCallIssue]
            _write(out, line)


def in_parts(workers: int, script: str, *arguments: str) -> bool:
    """Run a command of a script in so many processes, each a part of it; whether all ended well."""
    command = [sys.executable, script, *arguments, "--part"]
    processes = [subprocess.Popen([*command, f"{i}/{workers}"]) for i in range(workers)]
    # all of them, before the answer
    codes = [process.wait() for process in processes]
    return not any(codes)


def compile_candidates(index: int, count: int) -> None:
    """Launch every so-many-th candidate once, which leaves it in Triton's cache."""
    every = [(size, tiles) for size in SIZES for tiles in candidates(size)]
    for size, tiles in every[index::count]:
        try:
            wht_triton.wht(torch.zeros(16, size, device="cuda", dtype=torch.bfloat16), None, transpose=False, tiles=tiles)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{size} {tiles}: {type(error).__name__}", file=sys.stderr)


def run(out: Path) -> None:
    """Time the chosen cuts."""
    for size in SIZES:
        cases = [("bf16", rows, False) for rows in (512, 2048, 8192, 16384)]
        cases += [("bf16", 8192, True), ("fp16", 8192, False)]
        for dtype, rows, add in cases:
            if unfit(size, DTYPES[dtype]) is None:
                tiles = tiles_for(size)
                _write(out, measure(size, rows, dtype, tiles, with_torch=True, add=add))


def check(index: int, count: int) -> bool:
    """Compare with float64: at most twice the error of torch's form in the same dtype, or of rounding the exact result."""
    bad = 0
    for size, name in [(size, name) for name in DTYPES for size in CHECKED][index::count]:
        dtype = DTYPES[name]
        if (lacking := unfit(size, dtype)) is not None:
            print(f"{size} {name}: {lacking}")
            continue
        for transpose in (False, True):
            for rows, add, spread in ((1, False, 1.0), (131, True, 1.0), (131, False, 1000.0)):
                x = (torch.randn(rows, size, device="cuda") * spread).to(dtype)
                other = torch.randn(rows, size, device="cuda").to(dtype) if add else None
                exact = _exact(x, transpose) + (0 if other is None else other.double())
                error = _error(wht(x, transpose=transpose, add=other, backend="triton"), exact)
                torch_error = _error(wht(x, transpose=transpose, add=other, backend="torch"), exact)
                if not error <= 2 * max(torch_error, _error(exact.to(dtype), exact)) + 1e-7:
                    bad += 1
                    print(f"WRONG {size} {name} transpose={transpose} {rows} {add}: {error:.2e}, torch {torch_error:.2e}")
    # the reference of all this against the matrix itself
    x = torch.randn(3, 3072, dtype=torch.float64, device="cuda")
    bad += int(_error(_exact(x, True), x @ dense(3072, device="cuda").T) > 1e-12)
    print(f"part {index}: {bad} wrong")
    return bad == 0


def _write(out: Path, line: dict[str, object]) -> None:
    line["card"] = torch.cuda.get_device_name()
    text = json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in line.items()})
    print(text, flush=True)
    with out.open("a") as file:
        file.write(text + "\n")


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tune", "run", "check", "compile"])
    parser.add_argument("--out", type=Path, default=Path("bench_wht.jsonl"))
    parser.add_argument("--check", action="store_true", help="check first")
    parser.add_argument("--part", help="of check and compile: I/N, every N-th case from the I-th on, in this process")
    parser.add_argument("--workers", type=int, default=max(1, min(12, os.cpu_count() or 1)), help="processes that compile")
    arguments = parser.parse_args()
    if arguments.part:
        index, count = (int(number) for number in arguments.part.split("/"))
        if arguments.command == "check":
            sys.exit(not check(index, count))
        compile_candidates(index, count)
        return
    if arguments.check or arguments.command == "check":
        right = in_parts(arguments.workers, __file__, "check")
        print("all right" if right else "WRONG results, see above")
        if not right:
            sys.exit(1)
    if arguments.command == "tune":
        tune(arguments.out, arguments.workers)
    elif arguments.command == "run":
        run(arguments.out)


if __name__ == "__main__":
    main()
