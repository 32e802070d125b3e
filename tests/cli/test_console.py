"""What people see: plain lines outside a terminal, bars on one, tables with dashes for what was not measured."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from qwha_cli.cli.console import ConsoleEvents, duration, headline, wants_live, watching
from qwha_cli.cli.output import finite
from qwha_cli.cli.tables import results_table, worst_initialised_table, worst_quantized_table


@dataclass(frozen=True)
class Step:
    step: int
    loss: float = 1.5
    lr: float = 2e-4
    tokens_per_s: float = 1234.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(value: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=150)
    console.print(value)
    return console.file.getvalue()  # type: ignore[attr-defined]


def plain() -> tuple[ConsoleEvents, io.StringIO]:
    file = io.StringIO()
    return ConsoleEvents(Console(file=file, width=150, highlight=False), live=False), file


def test_plain_progress_is_about_ten_lines_a_stage() -> None:
    events, file = plain()
    events.stage_started("quantize", "missing")
    for done in range(1, 201):
        events.progress("quantize", done, 200, f"block {done}")
    events.stage_finished("quantize", 65.0, {"layer_error_mean": 0.01234, "bits_per_weight": 2.5})
    lines = file.getvalue().splitlines()
    assert 10 <= len(lines) - 2 <= 12
    assert lines[0] == "quantize running  (missing)"
    assert lines[-2] == "quantize 200/200  block 200"
    assert lines[-1] == "quantize done     1 min 05 s  layer error mean 0.01234  bits per weight 2.5"
    assert "\x1b" not in file.getvalue()


def test_plain_training_is_a_line_in_ten_steps_with_first_and_last() -> None:
    events, file = plain()
    sink = events.training()
    sink.start(25)
    for step in range(1, 26):
        sink.step(Step(step))
    sink.validation(25, 1.25)
    sink.note("resumed")
    lines = file.getvalue().splitlines()
    assert [line.split()[2] for line in lines[:4]] == ["1/25", "10/25", "20/25", "25/25"]
    assert "loss 1.5000  lr 2.00e-04  1,234 tokens/s" in lines[0]
    assert lines[4] == "train    step 25/25  validation loss 1.2500"
    assert lines[5].endswith("resumed")


def test_a_resumed_run_starts_where_it_was() -> None:
    events, file = plain()
    sink = events.training()
    sink.start(100)
    sink.step(Step(53))
    assert "step 53/100" in file.getvalue()


def test_fresh_stages_and_notes_are_one_line_each() -> None:
    events, file = plain()
    events.stage_fresh("init", Path("runs/x/2-init"))
    events.note("init", "layer with [brackets] " + "long " * 60)
    events.layers("init", [])
    lines = file.getvalue().splitlines()
    assert lines[0] == "init     fresh    runs/x/2-init"
    assert len(lines) == 2
    assert "[brackets]" in lines[1]


def test_a_bar_is_drawn_on_a_terminal_and_gone_afterwards() -> None:
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=120)
    with watching(console) as events:
        events.live = True
        sink = events.training()
        sink.start(4)
        sink.step(Step(2))
        events.progress("train", 3, 4, "loss [x]")
        assert events._bar is not None
    assert events._bar is None
    assert "3/4" in file.getvalue()
    assert "loss [x]" in file.getvalue()


@pytest.mark.parametrize(
    ("variables", "file", "live"),
    [
        ({}, Terminal(), True),
        ({"CI": "true"}, Terminal(), False),
        ({"TERM": "dumb"}, Terminal(), False),
        ({}, io.StringIO(), False),
        ({"FORCE_COLOR": "1"}, io.StringIO(), False),
    ],
)
def test_bars_are_for_terminals_only(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], file: io.StringIO, live: bool
) -> None:
    for name in ("CI", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_live(Console(file=file)) is live


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal()
    ConsoleEvents(Console(file=file, force_terminal=True), live=False).stage_fresh("init", Path("x"))
    assert "\x1b[3" not in file.getvalue()
    assert "\x1b[1;3" not in file.getvalue()


ROWS: list[dict[str, object]] = [
    {"row": "16-bit", "perplexity_answers": 3.14159, "bits_per_weight": 16.0, "layer_error": 0.0, "seconds": None, "tasks": {}},
    {
        "row": "base",
        "perplexity_answers": float("inf"),
        "exact_match": 0.125,
        "exact_match_stderr": 0.041,
        "layer_error": 0.03131,
        "megabytes": 1234.5,
        "seconds": 61.7,
        "tasks": {"arc_easy": [{"metric": "acc", "value": 0.3}, {"metric": "acc_norm", "value": 0.25, "stderr": 0.01}]},
    },
    {"row": "trained", "tasks": {"arc_easy": 0.5, "gsm8k": {"value": 0.1}}},
]


def test_the_table_shows_numbers_and_dashes_and_a_column_a_task() -> None:
    lines = drawn(results_table(ROWS, bits=2)).splitlines()
    cells = {line.split("  ")[0].strip(): line.split() for line in lines}
    assert cells["16-bit"][1:] == ["3.14", "–", "–", "–", "–", "0.0000", "16.00", "–", "–"]
    assert cells["2-bit base"][2:] == ["–", "–", "12.5", "±", "4.1", "25.0", "±", "1.0", "–", "0.0313", "–", "1,234", "62"]
    assert cells["+ trained"][2:] == ["–", "–", "–", "50.0", "10.0", "–", "–", "–", "–"]
    assert "arc_easy" in drawn(results_table(ROWS))


def test_the_table_without_tasks_fits_a_terminal_of_80_columns() -> None:
    full: dict[str, object] = {"perplexity_answers": 123456.78, "perplexity_text": 123456.78, "exact_match": 0.25}
    full |= {"exact_match_stderr": 0.04, "layer_error": 0.03, "bits_per_weight": 16.0, "megabytes": 1234, "seconds": 1234}
    rows = [{"row": row, **full} for row in ("16-bit", "base", "init", "trained", "merged")]
    assert max(len(line.rstrip()) for line in drawn(results_table(rows, bits=2)).splitlines()) <= 80


def test_the_worst_quantized_layers_come_first() -> None:
    layers = [{"name": f"layer{i}", "error_ratio": i / 100, "sqnr_db": 9.0, "seconds": 0.5} for i in range(9)]
    text = drawn(worst_quantized_table(layers, count=2))
    assert "worst 2 of 9 layers" in text
    assert text.index("layer8") < text.index("layer7")
    assert "layer6" not in text
    assert "sqnr" in text


def test_the_ten_worst_initialised_layers_come_first_with_what_they_won() -> None:
    layers = [
        {"name": f"model.layers.{i}.up", "error_zero": 0.5, "error_after": i / 100, "entries": 1000 * i, "seconds": 0.5}
        | {"entries_min": 2, "entries_median": 30, "entries_max": 4000}
        for i in range(12)
    ]
    text = drawn(worst_initialised_table(layers))
    assert "worst 10 of 12 layers, names after model.layers." in text
    rows = [line.split() for line in text.splitlines() if ".up" in line]
    assert [row[0] for row in rows] == [f"{i}.up" for i in range(11, 1, -1)]
    assert rows[0] == ["11.up", "0.5000", "→", "0.1100", "78", "%", "11,000", "2/30/4000", "0.5"]


def test_a_layer_without_numbers_has_dashes() -> None:
    line = next(line for line in drawn(worst_initialised_table([{"name": "a"}])).splitlines() if line.lstrip().startswith("a "))
    assert line.split() == ["a", "–", "→", "–", "–", "–", "–/–/–", "–"]


def test_init_ends_with_its_totals_and_verdict_and_quantize_does_not() -> None:
    file = io.StringIO()
    events = ConsoleEvents(Console(file=file, width=150, highlight=False), live=False, initializer="pursuit")
    events.layers("quantize", [{"name": "a", "error_ratio": 0.1}])
    events.stage_finished("quantize", 1.0, {})
    events.layers("init", [{"name": "a", "block": 0, "projection": "up", "error_zero": 0.017, "error_after": 0.0118}])
    events.stage_finished("init", 8.0, {"entries": 1200, "layer_error_max": 0.0118, "layer_error_mean": 0.0118})
    lines = file.getvalue().splitlines()
    assert lines[-3:] == [
        "init     done     8.0 s  entries 1,200  layer error max 0.0118",
        "init     total    mean layer error 0.0170 (zero) → 0.0118 (pursuit), 31 % recovered",
        "init     verdict  a good start. Predicted from the mean layer error 0.0118 (up to 0.0200 is small); evaluation decides.",
    ]
    assert sum("total" in line for line in lines) == 1


def test_a_headline_takes_known_results_first_and_any_otherwise() -> None:
    results = {"other": 1, "kl": 1e-7, "max_logit_difference": 0.123456}
    assert headline("merge", results) == "max logit difference 0.1235  kl 1e-07"
    assert headline("unknown", results) == "other 1  kl 1e-07  max logit difference 0.1235"


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (185, "3 min 05 s"), (3720, "1 h 02 min")])
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_json_has_no_numbers_that_json_does_not_have() -> None:
    value = {"a": float("nan"), "b": [float("inf"), 1.5, True], "c": Path("x"), 3: None}
    assert finite(value) == {"a": None, "b": [None, 1.5, True], "c": "x", "3": None}
