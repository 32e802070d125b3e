"""What people see of an initialisation: its worst layers, a heat map of characters, totals in one line and a verdict in one."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwha_cli.cli.tables import worst_initialised_table
from qwha_cli.report.initialisation import Initialisation, error_text
from qwha_cli.report.layers import layer_grid

# From small to large error. Shade and colour say the same, for NO_COLOR and for eyes that do not tell these colours apart.
SHADES = "·░▒▓█"
COLOURS = ("blue", "cyan", "green", "yellow", "red")
# Errors that differ by less are one shade: a scale stretched over rounding would invent a pattern.
SMALLEST_RATIO = 1.2
LABEL = 18


def show_layers(console: Console, found: Initialisation, *, heat_map: bool) -> None:
    """Print the worst layers and, on a terminal, the heat map."""
    console.print(worst_initialised_table(found.records))
    if heat_map and not console.options.ascii_only:
        console.print(text_heat_map(found, width=console.width))


def show_totals(console: Console, found: Initialisation) -> None:
    """Print the totals and the verdict."""
    for word, text in (("total", found.totals()), ("verdict", found.verdict().sentence)):
        label = Text.assemble((f"{'init':<9}", "bold cyan"), (f"{word:<9}", "green"))
        if not console.is_terminal:
            console.print(label + Text(text), soft_wrap=True)  # a log's line is a line, however long
            continue
        grid = Table.grid()
        grid.add_column(width=LABEL)
        grid.add_column(max_width=max(20, console.width - LABEL))
        grid.add_row(label, Text(text))
        console.print(grid)


def text_heat_map(found: Initialisation, *, width: int) -> Text:
    """Return the error of every layer after initialisation as shades, projections down and blocks across.

    Args:
        found: The initialisation.
        width: Columns of the terminal. Where the blocks do not fit, each column shows the worst of several.
    """
    grid = layer_grid(found.records, "error_after")
    names = max(len(name) for name in (*grid.projections, "block")) + 2
    blocks, room = len(grid.values[0]), max(8, width - names - 1)
    cell, together = (2, 1) if 2 * blocks <= room else (1, math.ceil(blocks / room))
    low, high = (min(grid.positive), max(grid.positive)) if grid.positive else (1.0, 1.0)
    levels = len(SHADES) if high >= SMALLEST_RATIO * low else 1
    text = Text("error after init" + (f", each column the worst of {together} blocks" if together > 1 else "") + "\n", "italic")
    for name, row in zip(grid.projections, grid.values, strict=True):
        text.append(f"{name:>{names - 2}}  ", "not italic")
        for first in range(0, blocks, together):
            known = [value for value in row[first : first + together] if value is not None]
            level = _level(max(known), low, high, levels) if known else None
            text.append(
                " " * cell if level is None else SHADES[level] * cell, "" if level is None else f"not italic {COLOURS[level]}"
            )
        text.append("\n")
    text.append(f"{'block':>{names - 2}}  {_axis(blocks, cell=cell, together=together)}\n{' ' * names}", "not italic")
    for level in range(levels):
        text.append(SHADES[level], f"not italic {COLOURS[level]}")
        text.append(f" to {error_text(low * (high / low) ** ((level + 1) / levels))}  ", "not italic")
    return text


def _level(error: float, low: float, high: float, levels: int) -> int:
    if error <= low or levels == 1:
        return 0
    return min(levels - 1, int(levels * math.log(error / low) / math.log(high / low)))


def _axis(blocks: int, *, cell: int, together: int) -> str:
    """Return numbers of blocks under their columns, as many as stand apart."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, blocks) if step * cell >= 4 * together or step == blocks)
    line = ""
    for block in range(0, blocks, step):
        line = f"{line:<{block // together * cell}}{block}"
    return line
