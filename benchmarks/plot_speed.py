"""The pictures of docs/results/speed.md: where the GPU's time in a step goes, and how time and memory grow.

    python benchmarks/plot_speed.py profile docs/results/data/profile.json docs/results/profile.png
    python benchmarks/plot_speed.py parts profile-ours-hadamard-16-on.json
    python benchmarks/plot_speed.py sweeps results/sweeps.jsonl results/sweeps.png

`parts` prints what a profile of bench_step.py is made of, as the first picture's file has it. `sweeps` takes any number of
files with lines of bench_memory.py or bench_step.py before the picture's name; a line belongs where its shape, sequences and
tokens say. A point that ran out of memory is where a curve ends.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from results_csv import read_lines
from sweeps import BATCHES, LENGTHS, SHAPE, SIZES, Line, Sweep, series

INK, FAINT, GRID, OURS, OTHERS = "#1d2330", "#626b7a", "#e4e6ea", "#c8552b", "#1f5f8b"
OURS_FAMILY = (OURS, "#e8a06f", "#8a3414", "#d98a1f", "#7d5a3c", "#c9a227", "#b0507a", "#5e4b8b")
OTHERS_FAMILY = ("#1d2330", OTHERS, "#6aa9d2", "#3f8f80", "#9aa3b0", "#7a6aa8")
# of a panel's height, between the middles of two labels
LABEL_GAP = 0.056


@dataclass(frozen=True)
class Panel:
    """One of the picture's four."""

    sweep: Sweep
    value: str
    title: str
    x_label: str
    ticks: Mapping[float, str]


_NUMBERS = {float(n): str(n) for n in BATCHES}
_TOKENS = {float(n): f"{n:,}" for n in LENGTHS}
_SIZES = {size: f"{size:.1f}" for size in SIZES.values()}
PANELS = (
    Panel("batch", "ms", "Milliseconds a step, by batch", "sequences of 512 tokens", _NUMBERS),
    Panel("batch", "peak_gib", "Peak memory in GiB, by batch", "sequences of 512 tokens", _NUMBERS),
    Panel("length", "ms", "Milliseconds a step, by sequence length", "tokens of one sequence", _TOKENS),
    Panel("model", "ms", "Milliseconds a step, by model size", "billions of parameters; one sequence of 512 tokens", _SIZES),
)


# kernels by name, the first that fits; what no pattern finds is "other"
PARTS = {
    "matrix products": r"nvjet|gemm|cutlass|xmma",
    "Liger's kernels": r"rms_norm|swiglu|triton_rope|liger|cross_entropy",
    "norms and gates with transforms (ours)": r"^_(norm|gate)_(for|back)ward",
    "8-bit numbers made, turned (ours)": r"^_to_fp8|^_transposed",
    "transforms (ours)": r"^_transform$",
    "attention": r"sdpa|fmha|flash|cudnn",
    "weights from codes (ours)": r"^_(write|weight|rows|turned|turned_entries|scales)$",
    "additions": r"CUDAFunctor_add",
    "gather at F's places (ours)": r"^_gather",
}


def parts(source: str) -> None:
    """Print milliseconds by part."""
    print(json.dumps(grouped(json.loads(Path(source).read_text())), indent=1))


def grouped(kernels: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """Milliseconds on the device by part, from lines with `name` and `cuda_ms`."""
    found = dict.fromkeys([*PARTS, "other"], 0.0)
    for kernel in kernels:
        # torch's own entries stand for kernels that are listed too
        if not str(kernel["name"]).startswith(("aten::", "Activity Buffer")):
            part = next((part for part, pattern in PARTS.items() if re.search(pattern, str(kernel["name"]))), "other")
            found[part] += cast(float, kernel["cuda_ms"])
    return {part: round(ms, 1) for part, ms in found.items()}


def profile(source: str, out: str) -> None:
    """Draw the cases of a profile side by side."""
    found = json.loads(Path(source).read_text())
    figure = Figure(figsize=(3 + 3.1 * len(found["cases"]), 3.8), dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(found["cases"]), sharey=True)
    known = {name for case in found["cases"].values() for name in case}
    names = [name for name in [*PARTS, "other"] if name in known]
    for axis, (case, ms) in zip(axes, found["cases"].items(), strict=True):
        # a case may be older than a kernel
        values = [ms.get(name, 0.0) for name in names]
        axis.barh(names, values, color=[OURS if "(ours)" in name else OTHERS for name in names], height=0.7)
        for y, value in enumerate(values):
            axis.text(value + 0.01 * max(values), y, f"{value:.1f}", va="center", color=INK, fontsize=9)
        whole = found.get("step_ms", {}).get(case)
        of = "" if whole is None else f" of {whole}"
        axis.set_title(f"{case}: {sum(values):.0f}{of} ms", loc="left", fontsize=10, color=INK)
        axis.set_xlabel("milliseconds of the GPU a step", color=FAINT, fontsize=9)
        axis.set_xlim(0, 1.13 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=FAINT, labelsize=9)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"{found['row']}, {found['shape']}, {found['device']}, commit {found['commit']}",
        x=0.01,
        ha="left",
        fontsize=9,
        color=FAINT,
    )
    figure.tight_layout()
    figure.savefig(out)


def sweeps(*paths: str) -> None:
    """Draw the four panels from files of lines, the last path being the picture's.

    Raises:
        SystemExit: There is nothing to draw.
    """
    *sources, out = paths
    lines = [line for source in sources for line in read_lines(Path(source))]
    drawn = [(panel, series(lines, panel.sweep)) for panel in PANELS]
    rows = list(dict.fromkeys(row for _, found in drawn for row in found))
    if not rows:
        raise SystemExit(
            f"no step of a sweep in {', '.join(sources) or 'no file'}: python benchmarks/bench_memory.py run --out FILE"
        )
    figure = Figure(figsize=(12.4, 8.6), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.045, right=0.855, top=0.945, bottom=0.115, wspace=0.53, hspace=0.3)
    colour = colours(rows)
    for axis, (panel, found) in zip(grid.flat, drawn, strict=True):
        draw(axis, panel, found, colour)
    shown = [line for _, found in drawn for points in found.values() for line in points.values()]
    figure.text(0.045, 0.025, caption(shown), fontsize=9, color=FAINT)
    figure.savefig(out)


def draw(axis: Axes, panel: Panel, found: Mapping[str, Mapping[float, Line]], colour: Mapping[str, str]) -> None:
    """One panel: a curve a row, its name at its end."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title(panel.title, loc="left", fontsize=11, color=INK)
    axis.set_xlabel(panel.x_label, fontsize=9, color=FAINT)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    axis.tick_params(colors=FAINT, labelsize=9, which="both", length=0)
    axis.grid(color=GRID, linewidth=0.7, which="major")
    axis.set_axisbelow(True)
    ends: dict[str, tuple[float, float]] = {}
    # ours last, so that they lie on top
    for row in sorted(found, key=is_ours):
        places = list(found[row])
        values = [cast(float, line[panel.value]) for line in found[row].values()]
        width = 2.2 if is_ours(row) else 1.4
        axis.plot(places, values, color=colour[row], linewidth=width, marker="o", markersize=2.2 * width, clip_on=False)
        ends[row] = (places[-1], values[-1])
    _tick(axis, panel)
    _name(axis, ends, colour, last=max(panel.ticks))


def is_ours(row: str) -> bool:
    """Whether a row is the product's."""
    return row.startswith("ours")


def colours(rows: Sequence[str]) -> dict[str, str]:
    """A colour a row: ours from one family, the others from the other, in the order of the rows."""
    found: dict[str, str] = {}
    for family, mine in ((OURS_FAMILY, [r for r in rows if is_ours(r)]), (OTHERS_FAMILY, [r for r in rows if not is_ours(r)])):
        found |= {row: family[i % len(family)] for i, row in enumerate(mine)}
    return found


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights as near to those wanted as can be (least squares) with a gap between any two, in the same order."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # without the gaps it is a monotone regression: neighbours in the wrong order meet at their mean
    blocks: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        mean, count = wanted[i] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, others = blocks.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        blocks.append((mean, count))
    heights = [mean for mean, count in blocks for _ in range(count)]
    found = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        found[i] = heights[rank] + rank * gap
    return found


def caption(lines: Sequence[Line]) -> str:
    """What all lines have in common, and what differs, one after the other."""
    told = {key: ", ".join(dict.fromkeys(str(line.get(key)) for line in lines)) for key in ("device", "torch", "commit", "rank")}
    kind = f"{SHAPE} in the first three; forward, loss and backward, checkpointing on, rank {told['rank']} or its budget"
    return f"{kind}. {told['device']}, torch {told['torch']}, commit {told['commit']}"


def _tick(axis: Axes, panel: Panel) -> None:
    places = sorted(panel.ticks)
    axis.set_xticks(places, [panel.ticks[place] for place in places])
    axis.xaxis.set_minor_locator(NullLocator())
    wide = places[-1] / places[0]
    axis.set_xlim(places[0] / wide**0.03, places[-1] * wide**0.03)
    # two numbers that would lie on each other make room
    labels = axis.get_xticklabels()
    for i, (one, other) in enumerate(itertools.pairwise(places)):
        if other / one < wide**0.08:
            labels[i].set_horizontalalignment("right")
            labels[i + 1].set_horizontalalignment("left")
    low, high = axis.get_ylim()
    # less than a decade needs more numbers
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 6, 8), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _name(axis: Axes, ends: Mapping[str, tuple[float, float]], colour: Mapping[str, str], *, last: float) -> None:
    """Each row's name right of the panel, with a thin line to where its curve ends, dotted if that is before the last place."""
    to_panel = axis.transData + axis.transAxes.inverted()
    spots = [to_panel.transform(end) for end in ends.values()]
    heights = spread([float(y) for _, y in spots], LABEL_GAP)
    for (row, end), (x, y), height in zip(ends.items(), spots, heights, strict=True):
        style = "-" if end[0] == last else ":"
        xs, ys = [float(x) + 0.012, 1.04, 1.055], [float(y), height, height]
        line = Line2D(xs, ys, color=colour[row], linewidth=0.8, linestyle=style, transform=axis.transAxes)
        line.set_clip_on(False)
        axis.add_artist(line)
        weight = "bold" if is_ours(row) else "normal"
        axis.text(1.065, height, row, color=colour[row], fontsize=9, va="center", weight=weight, transform=axis.transAxes)


if __name__ == "__main__":
    {"profile": profile, "parts": parts, "sweeps": sweeps}[sys.argv[1]](*sys.argv[2:])
