"""The pictures of a run as PNG: loss curve, layer-error heat map, entries per row.

Every function builds its own Figure with its own Agg canvas: no pyplot, no global state, no display. `out` is a path or a binary
stream. Each picture exists in a light and a dark theme, because the HTML report follows the reader's colour scheme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from qwha_cli.errors import DataError
from qwha_cli.report.entries import EntriesHistogram
from qwha_cli.report.layers import Records, layer_grid

Theme = Literal["light", "dark"]
DPI = 160
# From so many bins on, the numbers under all of them would touch.
MANY_BINS = 16


@dataclass(frozen=True)
class _Colours:
    paper: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, str, str]
    scale: tuple[str, ...]  # from small to large error


_COLOURS: Mapping[Theme, _Colours] = {
    "light": _Colours(
        paper="#ffffff",
        ink="#1d2330",
        faint="#626b7a",
        grid="#e4e6ea",
        series=("#1f5f8b", "#c8552b", "#5b8c3e"),
        scale=("#f3f5ee", "#cfdcd0", "#8fb7b3", "#4d879b", "#2b5579", "#1b2a4e"),
    ),
    "dark": _Colours(
        paper="#171b22",
        ink="#e6e8ec",
        faint="#98a1b0",
        grid="#2b313b",
        series=("#6cb2e0", "#f0936a", "#9cc97c"),
        scale=("#1d2430", "#20405a", "#2b6b84", "#58a09c", "#a9cfa4", "#f4f1d0"),
    ),
}


def loss_curve(metrics: Path | Records, out: Path | BinaryIO, *, theme: Theme = "light") -> None:
    """Draw the training loss, its running mean, and the validation loss over the optimizer's steps.

    Args:
        metrics: metrics.jsonl, or its records.
        out: Where the PNG goes.
        theme: Colours.

    Raises:
        DataError: There is no finite loss to draw.
    """
    records = _read(metrics) if isinstance(metrics, Path) else metrics
    steps, losses = _series(records, "loss")
    checked, validation = _series(records, "validation_loss")
    if not losses and not validation:
        where = str(metrics) if isinstance(metrics, Path) else "metrics"
        raise DataError("no loss to draw", where=where, remedy="train at least one step")
    figure, axes, colours = _canvas(8.6, 3.7, theme)
    if losses:
        axes.plot(steps, losses, color=colours.series[0], alpha=0.28, linewidth=0.9, label="each step")
        axes.plot(steps, running_mean(losses), color=colours.series[0], linewidth=1.9, label="running mean")
    if validation:
        axes.plot(checked, validation, color=colours.series[1], linewidth=1.4, marker="o", markersize=4, label="validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.margins(x=0.015)
    axes.legend(frameon=False, labelcolor=colours.ink, fontsize=9, loc="upper right")
    _save(figure, out)


def running_mean(values: Sequence[float], *, share: float = 0.05) -> list[float]:
    """Return the mean over a centred window of about `share` of the values; a trailing one would lag behind a falling loss."""
    half, count = round(share * len(values)) // 2, len(values)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    # Near the ends only the part of the window inside the data counts.
    first = np.maximum(np.arange(count) - half, 0)
    last = np.minimum(np.arange(count) + half + 1, count)
    return [float(mean) for mean in (sums[last] - sums[first]) / (last - first)]


def layer_heatmap(
    layers: Records,
    value: str,
    out: Path | BinaryIO,
    *,
    title: str = "",
    limits: tuple[float, float] | None = None,
    theme: Theme = "light",
) -> None:
    """Draw one number of every layer, projections down and blocks across, on a logarithmic scale.

    Args:
        layers: Records with `block`, `projection` and the value, a fraction.
        value: Name of the value, e.g. "error_after".
        out: Where the PNG goes.
        title: A line above the map.
        limits: Smallest and largest value of the colours, so that two maps compare; the data's own by default.
        theme: Colours.

    Raises:
        DataError: No record has the value.
    """
    found = layer_grid(layers, value)
    names, known = found.projections, found.positive
    grid = np.array([[math.nan if v is None else v for v in row] for row in found.values])
    low, high = limits or ((min(known), max(known)) if known else (1e-6, 1.0))
    norm = LogNorm(vmin=low, vmax=max(high, low * 1.0001), clip=True)
    count = grid.shape[1]
    figure, axes, colours = _canvas(min(13.0, max(5.2, 1.75 + 0.265 * count)), 0.95 + 0.3 * len(names), theme)
    scale = LinearSegmentedColormap.from_list("error", colours.scale).with_extremes(bad=colours.paper)
    # A zero error is not missing: it gets the lowest colour.
    shown = np.where(grid <= 0, low, grid)
    image = axes.imshow(np.ma.masked_invalid(shown), aspect="auto", cmap=scale, norm=norm, interpolation="nearest")
    _annotate(axes, grid, norm, colours, theme)
    every = max(1, math.ceil(count / 36))
    axes.set_xticks(range(0, count, every), [str(i) for i in range(0, count, every)])
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(np.arange(-0.5, count), minor=True)
    axes.set_yticks(np.arange(-0.5, len(names)), minor=True)
    axes.grid(visible=False, which="major")
    axes.grid(which="minor", color=colours.paper, linewidth=1.2)
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("block")
    if title:
        axes.set_title(title, loc="left", color=colours.ink, fontsize=10.5, pad=8)
    _colour_bar(figure, axes, image, low=low, high=high, colours=colours)
    _save(figure, out)


def entries_histogram(histogram: EntriesHistogram | None, out: Path | BinaryIO, *, theme: Theme = "light") -> None:
    """Draw how many rows of F got how many entries; bins of half an octave are equally wide, so the axis is logarithmic.

    Args:
        histogram: Rows by their number of entries, summed over layers.
        out: Where the PNG goes.
        theme: Colours.

    Raises:
        DataError: There is no row.
    """
    if histogram is None or not histogram.counts:
        raise DataError("no entries to draw", where="layers", remedy="run the init stage again")
    figure, axes, colours = _canvas(8.6, 3.3, theme)
    places = range(len(histogram.counts))
    axes.bar(places, histogram.counts, width=0.92, align="edge", color=colours.series[0])
    # each label stands at the left edge of its bin; powers of two are enough where there are many
    shown = [i for i, edge in enumerate(histogram.edges) if len(places) < MANY_BINS or edge & (edge - 1) == 0]
    axes.set_xticks([place - 0.04 for place in shown], [f"{histogram.edges[place]:,}" for place in shown])
    margin = max(0.5, (8 - len(places)) / 2)  # one bin alone is a bar, not a wall
    axes.set_xlim(-margin, len(places) + margin)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.set_xlabel("entries in a row, from each number up to the next")
    axes.set_ylabel("rows")
    _save(figure, out)


def _canvas(width: float, height: float, theme: Theme) -> tuple[Figure, Axes, _Colours]:
    """Return a figure (inches) with one pair of axes in a theme's colours."""
    colours = _COLOURS[theme]
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=colours.paper, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(colours.paper)
    axes.grid(axis="y", color=colours.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours.faint, labelsize=9, length=3)
    axes.xaxis.label.set(color=colours.faint, fontsize=9.5)
    axes.yaxis.label.set(color=colours.faint, fontsize=9.5)
    for name, side in axes.spines.items():
        side.set_visible(name == "bottom")
        side.set_color(colours.faint)
    return figure, axes, colours


def _annotate(axes: Axes, grid: np.ndarray, norm: LogNorm, colours: _Colours, theme: Theme) -> None:
    """Write each value in per cent into its cell, in the ink that stands out; larger maps are left to the colours."""
    if grid.shape[1] > 36:
        return
    for (row, column), found in np.ndenumerate(grid):
        if not math.isfinite(found):
            continue
        dark_cell = (float(norm(found)) if found > 0 else 0.0) > 0.52
        on_dark = dark_cell if theme == "light" else not dark_cell
        text = f"{100 * found:.0f}" if found >= 0.0995 else f"{100 * found:.1f}" if found >= 0.0005 else "0"
        axes.text(column, row, text, ha="center", va="center", fontsize=6.6, color="#ffffff" if on_dark else "#12161d")


def _colour_bar(figure: Figure, axes: Axes, image: object, *, low: float, high: float, colours: _Colours) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.012, fraction=0.03, aspect=18)  # pyright: ignore[reportArgumentType]
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.yaxis.set_major_locator(FixedLocator(_round_numbers(low, high)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    bar.ax.tick_params(colors=colours.faint, labelsize=8, length=2)


def _round_numbers(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2, 5 · 10^k between two positive values; the ends themselves where there are fewer than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    return found if len(found) > 1 else sorted({low, high})


def _series(records: Records, name: str) -> tuple[list[float], list[float]]:
    """Return the steps and finite values of a metric."""
    points = [(_finite(r.get("step")), _finite(r.get(name))) for r in records]
    kept = [(step, value) for step, value in points if step is not None and value is not None]
    return [s for s, _ in kept], [v for _, v in kept]


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _save(figure: Figure, out: Path | BinaryIO) -> None:
    # No creation date and no version inside: equal inputs give equal files.
    figure.savefig(out, format="png", dpi=DPI, facecolor=figure.get_facecolor(), metadata={"Software": None})
