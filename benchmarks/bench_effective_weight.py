"""The kernels that make a layer's weight, against the bandwidth of a copy measured in the same run.

    python benchmarks/bench_effective_weight.py tune --out results.jsonl     every cut; prints the best and the chosen
    python benchmarks/bench_effective_weight.py run --out results.jsonl      the product's own choice, beside torch
    python benchmarks/bench_effective_weight.py run --check                  first, that all results are torch's to the bit

Forms are dense, in bfloat16, and two in 8 bits (kernels/weight_fp8.py), "rows" and "turned". Bytes of a weight are its codes,
scales and zeros, 2 + 4 a entry of F, and 2 a weight written, or 1 in 8 bits. Time is taken as timing.py says, so
that neither the host nor the cache flatters. One line of JSON a measurement; `share` is that of a large copy's bandwidth,
`share_alike` that of a copy which moves as many bytes as the kernel, and which like it does not fill the device for long.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO

import torch
from timing import copy_bandwidth, graph_us, num_copies
from torch import Tensor

from qwha_cli.kernels import dequantize_cut as cut
from qwha_cli.kernels import dequantize_triton as kernel
from qwha_cli.kernels import weight_fp8_triton, weight_tile_triton
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize
from qwha_cli.kernels.effective_weight import effective_weight, gather_entries
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.unpack import num_words

SHAPES = [(3072, 3072), (1024, 3072), (8192, 3072), (3072, 8192), (4096, 4096), (14336, 4096), (4096, 14336)]
KINDS = ["2", "3", "4", "nf4", "dense"]
GROUP = 64
DENSITY = 0.042
FORMS = ("dense", "rows", "turned")

Base = Codes | Tensor


def random_base(kind: str, shape: tuple[int, int], device: str = "cuda") -> Base:
    """A matrix of random codes, or a dense one in bfloat16."""
    out, size = shape
    if kind == "dense":
        return torch.randn(shape, dtype=torch.bfloat16, device=device)
    if kind == "nf4":
        packed = torch.randint(0, 256, (out * size // 2, 1), device=device).to(torch.uint8)
        scales = torch.rand(out * size // GROUP, device=device)
        return Codes(packed, scales, torch.linspace(-1, 1, 16, device=device), "nf4", shape, 4, 4, GROUP)
    bits = int(kind)
    zero_bits = max(bits, 4) if bits == 2 else bits

    def words(rows: int, columns: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns), device=device).to(torch.int32)

    scales = torch.rand(size // GROUP, out, device=device).half()
    codes, zeros = words(num_words(size, bits=bits), out), words(size // GROUP, num_words(out, bits=zero_bits))
    return Codes(codes, scales, zeros, "gptq", shape, bits, zero_bits, GROUP)


def random_entries(shape: tuple[int, int], device: str = "cuda") -> tuple[Tensor, Places]:
    """Values and places, as dense as a rank of 64 makes them in the middle of these shapes."""
    flat = (torch.rand(shape, device=device) < DENSITY).view(-1).nonzero().view(-1).to(torch.int32)
    return torch.randn(flat.numel(), device=device), Places.from_flat(flat, shape=shape)


def copy_of(base: Base) -> Base:
    """The same numbers in other memory."""
    if isinstance(base, Tensor):
        return base.clone()
    tensors = (base.codes.clone(), base.scales.clone(), base.zeros.clone())
    return Codes(*tensors, base.layout, base.shape, base.bits, base.zero_bits, base.group_size)


def size_of(base: Base | None) -> int:
    """Bytes."""
    if base is None:
        return 0
    tensors = (base,) if isinstance(base, Tensor) else (base.codes, base.scales, base.zeros)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Report:
    """Lines of JSON, to a file and on wish to the screen."""

    def __init__(self, file: IO[str] | None, copy: float) -> None:
        self.file, self.copy = file, copy
        self.alike: dict[int, float] = {}

    def line(self, taken: float, moved: int, *, show: bool = True, **fields: object) -> dict[str, object]:
        """Note a measurement of so many microseconds and bytes."""
        share = moved / (taken * 1e-6) / self.copy
        record = {**fields, "us": round(taken, 2), "gb_s": round(moved / taken / 1000), "share": round(share, 3)}
        if show and moved:
            record["share_alike"] = round(self.copy_us(moved) / taken, 3)
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
        if show:
            print(json.dumps(record), flush=True)
        return record

    def copy_us(self, moved: int) -> float:
        """Microseconds of a copy that reads and writes so many bytes together."""
        if moved not in self.alike:
            # whole MiB, as the driver copies other sizes at two thirds of the speed (an H200); as a share of that time
            size = max(1, round(moved / 2 / 2**20)) * 2**20
            sources = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(num_copies(moved))]
            self.alike[moved] = graph_us([partial(torch.clone, source) for source in sources]) * moved / 2 / size
        return self.alike[moved]


Entries = tuple[Tensor, Places, float]
Job = tuple[Base | None, Entries, Tensor, kernel.Form | None]


def room(shape: tuple[int, int], form: str) -> tuple[Tensor, kernel.Form | None]:
    """A weight to write in a form."""
    if form == "dense":
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda"), None
    scales = torch.ones(shape[0] if form == "rows" else 1, device="cuda")
    size = shape if form == "rows" else shape[::-1]
    same = torch.empty(size[0], device="cuda")
    return torch.empty(size, dtype=torch.float8_e4m3fn, device="cuda"), kernel.Form(form, scales, same)  # pyright: ignore


def sets(base: Base | None, values: Tensor, places: Places, moved: int, form: str = "dense") -> list[Job]:
    """Copies of a base and of the entries, each with a weight to write."""
    found: list[Job] = []
    for _ in range(num_copies(moved)):
        own = Places(places.row_starts.clone(), places.columns.clone(), places.shape)
        found.append((None if base is None else copy_of(base), (values.clone(), own, 0.5), *room(places.shape, form)))
    return found


# none: the kernel of weight_tile_triton.py, which has one cut
Cut = cut.Config | cut.TableCut | None


def looked_up(base: Base | None, form: str) -> bool:
    """Whether a weight's numbers are looked up."""
    return form != "dense" and isinstance(base, Codes) and weight_fp8_triton.in_whole_words(base)


def chosen_for(base: Base | None, form: str) -> Cut:
    """What the product takes."""
    if form == "dense" and weight_tile_triton.takes(base, torch.bfloat16, GROUP):
        return None
    if form == "dense" or base is None:
        return cut.config_for(base)
    if looked_up(base, form):
        return cut.table_cut_for(is_turned=form == "turned")
    return cut.fp8_config_for(is_turned=form == "turned")


def candidates(base: Base, form: str) -> Sequence[Cut]:
    """What may be taken."""
    if looked_up(base, form):
        return cut.TURNED_TABLE_CANDIDATES if form == "turned" else cut.TABLE_CANDIDATES
    return cut.TURNED_CANDIDATES if form == "turned" else cut.CANDIDATES


def write(weight: Tensor, base: Base | None, entries: Entries | None, config: Cut, form: kernel.Form | None) -> None:
    """Launch the kernel that a cut is for."""
    if config is None:
        weight_tile_triton.launch(weight, base, entries)  # pyright: ignore
    elif not isinstance(config, cut.TableCut):
        kernel.launch(weight, base, entries, config, form)
    elif form is not None and form.kind == "turned":
        weight_fp8_triton.launch_turned(weight, base, entries, config, form.scales, form.same)  # pyright: ignore
    else:
        weight_fp8_triton.launch_rows(weight, base, entries, config)  # pyright: ignore


def launch_in_torch(weight: Tensor, base: Base, entries: tuple[Tensor, Places, float]) -> Tensor:
    """What the kernel replaces."""
    values, places, scale = entries
    return effective_weight(
        base, values, places, basis="hadamard", scale=scale, dtype=weight.dtype, transform="wht", backend="torch"
    )


def compile_all(jobs: list[tuple[str, str, Cut]]) -> None:
    """Launch each kind with each cut once, which leaves the kernels in Triton's cache on the disk."""
    entries = random_entries((256, 3072))
    for form, kind, config in jobs:
        weight, how = room((256, 3072), form)
        write(weight, random_base(kind, (256, 3072)), (*entries, 1.0), config, how)
    torch.cuda.synchronize()


def tune(report: Report, workers: int, forms: list[str], kinds: list[str]) -> None:
    """Every cut on every shape and kind."""
    begun = time.perf_counter()
    bases = {kind: random_base(kind, (256, 3072)) for kind in kinds}
    jobs = [(form, kind, config) for form in forms for kind in kinds for config in candidates(bases[kind], form)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_all, [jobs[i::workers] for i in range(workers)]))
    print(json.dumps({"compiled": len(jobs), "s": round(time.perf_counter() - begun)}), flush=True)
    for shape in SHAPES:
        values, places = random_entries(shape)
        for form, kind in itertools.product(forms, kinds):
            base = random_base(kind, shape)
            moved = size_of(base) + 6 * len(places) + (2 if form == "dense" else 1) * shape[0] * shape[1]
            rotated = sets(base, values, places, moved, form)
            chosen = chosen_for(base, form)
            found: list[dict[str, object]] = []
            for config in {*candidates(base, form), chosen}:
                calls = [partial(write, weight, own, entries, config, how) for own, entries, weight, how in rotated]
                how_cut = {} if config is None else asdict(config)
                fields = {"shape": shape, "form": form, "kind": kind, "chosen": config == chosen, **how_cut}
                found.append(report.line(graph_us(calls), moved, show=False, **fields))
            found.sort(key=lambda record: float(str(record["us"])))
            for record in [*found[:2], *(r for r in found[2:] if r["chosen"])]:
                print(json.dumps(record), flush=True)


def run(report: Report, *, check: bool) -> None:
    """What the product does, beside torch."""
    for shape in SHAPES:
        values, places = random_entries(shape)
        weights = 2 * shape[0] * shape[1]
        for kind in [*KINDS, "zeros"]:
            base = None if kind == "zeros" else random_base(kind, shape)
            if check and base is not None:
                compare(base, values, places)
            moved = size_of(base) + 6 * len(places) + weights
            for form in FORMS if kind != "zeros" else FORMS[:1]:
                less = 0 if form == "dense" else shape[0] * shape[1]
                rotated = sets(base, values, places, moved - less, form)
                config = chosen_for(base, form)
                calls = [partial(write, weight, own, entries, config, how) for own, entries, weight, how in rotated]
                op = "effective_weight" if form == "dense" else f"effective_weight, 8 bits, {form}"
                report.line(graph_us(calls), moved - less, op=op, shape=shape, kind=kind)
            rotated = sets(base, values, places, moved)
            config = chosen_for(base, "dense")
            if isinstance(base, Codes):
                calls = [partial(write, weight, own, None, config, None) for own, _, weight, _ in rotated]
                report.line(graph_us(calls), moved - 6 * len(places), op="dequantize", shape=shape, kind=kind)
            if kind in ("2", "dense"):
                calls = [
                    partial(launch_in_torch, weight, own, entries) for own, entries, weight, _ in rotated[:2] if own is not None
                ]
                report.line(graph_us(calls), moved, op="effective_weight, torch", shape=shape, kind=kind)
        rotated = sets(None, values, places, weights)
        for backend in ("triton", "torch"):
            calls = [partial(gather_entries, weight, e[1], scale=0.5, backend=backend) for _, e, weight, _ in rotated]
            report.line(graph_us(calls), weights + 6 * len(places), op=f"gather, {backend}", shape=shape)
    report.line(host_microseconds(), 0, op="host time of a call of effective_weight")


def host_microseconds() -> float:
    """What a call costs the host, with a kernel so small that nothing waits for it."""
    shape = (256, 1024)
    base, (values, places) = random_base("2", shape), random_entries(shape)
    how = {"basis": "hadamard", "scale": 0.5, "dtype": torch.bfloat16}
    for count in (20, 200):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            effective_weight(base, values, places, **how)
        taken = time.perf_counter() - begun
    return taken / count * 1e6


def compare(base: Base, values: Tensor, places: Places) -> None:
    """Refuse a result that is not torch's to the bit."""
    how = {"basis": "hadamard", "scale": 0.5, "dtype": torch.bfloat16}
    expected = effective_weight(base, values, places, backend="torch", **how)
    assert torch.equal(effective_weight(base, values, places, backend="triton", **how), expected)
    found = gather_entries(expected, places, scale=0.5, backend="triton")
    assert torch.equal(found, gather_entries(expected, places, scale=0.5, backend="torch"))
    if isinstance(base, Codes):
        assert torch.equal(dequantize(base, torch.bfloat16), dequantize(base, torch.bfloat16, backend="torch"))
    if places.shape[0] == SHAPES[0][0]:
        for config in cut.CANDIDATES[::5]:
            weight = torch.empty(places.shape, dtype=torch.bfloat16, device="cuda")
            kernel.launch(weight, base, (values, places, 0.5), config)
            assert torch.equal(weight, expected), config


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tune", "run"])
    parser.add_argument("--out", type=Path, help="append all lines to this file")
    parser.add_argument("--check", action="store_true", help="compare with torch first")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="which to tune")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of which bases")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    copy = copy_bandwidth("cuda")
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_gb_s": round(copy / 1e9)}), flush=True)
    file = arguments.out.open("a") if arguments.out else None
    report = Report(file, copy)
    if arguments.command == "tune":
        tune(report, arguments.workers, arguments.forms, arguments.kinds)
    else:
        run(report, check=arguments.check)
    if file is not None:
        file.close()


if __name__ == "__main__":
    main()
