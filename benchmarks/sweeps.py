"""The sweeps of docs/results/speed.md: which steps each is made of, and which measured lines belong to it.

Three sweeps share steps (3B, one sequence of 512 tokens is in all of them), so a line of JSON does not say which sweep it was
measured for; what it is says where it belongs. All have checkpointing on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

Sweep = Literal["batch", "length", "model"]
SWEEPS: tuple[Sweep, ...] = ("batch", "length", "model")

SHAPE = "llama-3.2-3b"
LENGTH = 512
BATCHES = (1, 2, 4, 8, 16)
LENGTHS = (512, 1024, 2048, 4096, 8192)
# names of models/random.py, and billions of parameters
SIZES = {"qwen2.5-0.5b": 0.494, "llama-3.2-1b": 1.236, "llama-3.2-3b": 3.213, "mistral-7b": 7.248, "llama-3.1-8b": 8.030}

Line = Mapping[str, object]


@dataclass(frozen=True)
class Point:
    """A step: a model of a shape, and sequences of so many tokens."""

    shape: str
    batch: int
    length: int

    @property
    def case(self) -> str:
        """As bench_step.CASES calls it."""
        return f"{self.batch} on"

    def place(self, sweep: Sweep) -> float:
        """Where it stands along a sweep: sequences, tokens or billions of parameters."""
        return {"batch": float(self.batch), "length": float(self.length), "model": SIZES.get(self.shape, 0.0)}[sweep]


def points(sweep: Sweep, *, shape: str = SHAPE) -> list[Point]:
    """The steps of a sweep, small ones first; `shape` is that of the sweeps over sequences and tokens."""
    match sweep:
        case "batch":
            return [Point(shape, batch, LENGTH) for batch in BATCHES]
        case "length":
            return [Point(shape, 1, length) for length in LENGTHS]
        case "model":
            return [Point(name, 1, LENGTH) for name in SIZES]


def by_shape(sweeps: Iterable[Sweep], *, shape: str = SHAPE) -> dict[str, list[Point]]:
    """The steps of several sweeps, none twice, under the model that takes them; short sequences first."""
    wanted = {point for sweep in sweeps for point in points(sweep, shape=shape)}
    ordered = sorted(wanted, key=lambda p: (SIZES.get(p.shape, 0.0), p.length, p.batch))
    return {name: [p for p in ordered if p.shape == name] for name in dict.fromkeys(p.shape for p in ordered)}


def point_of(line: Line) -> Point | None:
    """The step that a line of bench_step or bench_memory measured; None where checkpointing was off, or the loss not Liger's."""
    found = re.fullmatch(r"(\d+) on", str(line.get("case")))
    if found is None or line.get("loss_kernels") != "liger":
        return None
    return Point(str(line["shape"]), int(found[1]), cast(int, line["length"]))


def series(lines: Iterable[Line], sweep: Sweep, *, shape: str = SHAPE) -> dict[str, dict[float, Line]]:
    """A sweep's lines by row and by place along it, in the order of the sweep; of two for the same step the later one."""
    wanted = points(sweep, shape=shape)
    found: dict[str, dict[Point, Line]] = {}
    for line in lines:
        point = point_of(line)
        if point in wanted:
            found.setdefault(str(line["row"]), {})[point] = line
    return {row: {point.place(sweep): mine[point] for point in wanted if point in mine} for row, mine in found.items()}
