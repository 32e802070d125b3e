"""The heat map of characters and the lines about an initialisation: places, shades, 80 columns, colours only where wanted."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from qwha_cli.cli.init_display import SHADES, show_layers, show_totals, text_heat_map
from qwha_cli.report.initialisation import Initialisation, initialisation
from support.run_folder import layer_records

LARGE = {"entries": 1_179_648, "entries_min": 12, "entries_median": 345, "entries_max": 14336, "seconds": 53.0}


def found(records: list[dict[str, object]]) -> Initialisation:
    value = initialisation(records, method="pursuit")
    assert value is not None
    return value


def grid(*rows: tuple[float | None, ...]) -> Initialisation:
    """Return an initialisation with these errors, projections down and blocks across."""
    records: list[dict[str, object]] = [
        {"name": f"{block}.p{row}", "block": block, "projection": f"p{row}", "error_zero": 1.0, "error_after": error}
        for row, errors in enumerate(rows)
        for block, error in enumerate(errors)
        if error is not None
    ]
    return found(records)


def lines(value: Initialisation, *, width: int = 80) -> list[str]:
    return text_heat_map(value, width=width).plain.splitlines()


def test_shades_rise_evenly_in_the_logarithm_and_an_absent_layer_is_blank() -> None:
    told = lines(grid((1e-5, 1.1e-4, 1.1e-3, 1.1e-2, 1.0), (0.0, None, 1.0, 1.0, 1.0)))
    assert told[1] == "   p0  ··░░▒▒▓▓██"
    assert told[2] == "   p1  ··  ██████"
    assert told[-1].split() == [
        "·",
        "to",
        "0.0001",
        "░",
        "to",
        "0.0010",
        "▒",
        "to",
        "0.0100",
        "▓",
        "to",
        "0.1000",
        "█",
        "to",
        "1.0000",
    ]


def test_errors_that_hardly_differ_are_one_shade() -> None:
    told = lines(grid((0.100, 0.101, 0.105)))
    assert told[1] == "   p0  ······"
    assert "█" not in told[-1]


def test_a_map_without_any_error_is_drawn() -> None:
    assert lines(grid((0.0, 0.0)))[1] == "   p0  ····"


@pytest.mark.parametrize(("blocks", "cell", "together"), [(34, 2, 1), (35, 1, 1), (68, 1, 1), (69, 1, 2), (126, 1, 2)])
def test_many_blocks_get_narrow_columns_and_then_share_them(blocks: int, cell: int, together: int) -> None:
    value = found(layer_records(blocks))
    told = lines(value)
    assert max(len(line) for line in told) <= 80
    assert len(told[1]) == 11 + -(-blocks // together) * cell
    assert (f"the worst of {together} blocks" in told[0]) == (together > 1)


def test_a_shared_column_shows_the_worst_of_its_blocks() -> None:
    errors = [0.001] * 100
    errors[51] = 0.5
    row = lines(grid(tuple(errors)))[1].removeprefix("   p0  ")
    assert [place for place, shade in enumerate(row) if shade == "█"] == [51 // 2]


@pytest.mark.parametrize("blocks", [1, 2, 7, 32, 100, 500])
def test_the_numbers_below_stand_under_their_blocks(blocks: int) -> None:
    told = lines(grid(tuple([0.5] * blocks)), width=80)
    cell, together = (2, 1) if blocks <= 36 else (1, -(-blocks // 72))
    offset = told[1].index("·")
    numbers = list(re.finditer(r"\d+", told[2]))
    assert numbers[0].group() == "0"
    assert [number.start() for number in numbers] == [offset + int(number.group()) // together * cell for number in numbers]


def test_table_map_and_sentences_fit_80_columns_for_a_large_model() -> None:
    value = found([r | LARGE | {"compare": {"cloq": 0.05, "adaalloc": 0.04}} for r in layer_records(80)])
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None, highlight=False, _environ={})
    show_layers(console, value, heat_map=True)
    show_totals(console, value)
    told = file.getvalue()
    assert max(len(line.rstrip()) for line in told.splitlines()) <= 80
    for text in ("1,179,648", "12/345/14336", "10.self_attn.v_proj", "zero → init"):
        assert text in told
    assert "…" not in told


def test_a_log_has_no_map_and_one_line_a_sentence() -> None:
    file = io.StringIO()
    console = Console(file=file, width=60, highlight=False)
    show_layers(console, found(layer_records(2)), heat_map=False)
    show_totals(console, found(layer_records(2)))
    told = file.getvalue()
    assert not set(told) & set(SHADES)
    assert [line.split()[1] for line in told.splitlines()[-2:]] == ["total", "verdict"]
    assert told.endswith("evaluation decides.\n")


@pytest.mark.parametrize(
    ("variables", "coloured"), [({"TERM": "xterm-256color"}, True), ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False)]
)
def test_no_color_keeps_the_shades_and_drops_the_colours(variables: dict[str, str], coloured: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, _environ=variables)
    show_layers(console, found(layer_records(6)), heat_map=True)
    assert set(SHADES) < set(file.getvalue())
    assert ("\x1b[31m" in file.getvalue()) == coloured
