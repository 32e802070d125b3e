"""What people see while a run works: stage lines, one live bar, notes, tables. All of it on stderr.

On a terminal a bar is redrawn in place. Elsewhere (a file, a pipe, CI=true) the same facts come as plain lines, one in ten steps.
NO_COLOR is obeyed by rich. Under torchrun only the first rank speaks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from qwha_cli.cli.init_display import show_layers, show_totals
from qwha_cli.cli.tables import worst_quantized_table
from qwha_cli.recipe.load import display_name
from qwha_cli.report.initialisation import Initialisation, initialisation
from qwha_cli.report.layers import finite_number
from qwha_cli.stages.ranks import own_ranks

# Of a stage's results, what its closing line says. Init's errors stand in lines of their own.
HEADLINES: Mapping[str, tuple[str, ...]] = {
    "quantize": ("layer_error_mean", "bits_per_weight", "worst_layer"),
    "init": ("entries", "layer_error_max", "adapter_bits_per_entry", "bits_per_weight"),
    "train": ("steps", "first_loss", "last_loss", "tokens"),
    "eval": ("rows",),
    "merge": ("max_logit_difference", "kl", "megabytes"),
}
LINES_A_STAGE = 10
LOG_WIDTH = 120


class StepReading(Protocol):
    """What the display reads of an optimizer step."""

    @property
    def step(self) -> int:
        """Counted from 1."""
        ...

    @property
    def loss(self) -> float:
        """Nats a token."""
        ...

    @property
    def lr(self) -> float:
        """The learning rate used."""
        ...

    @property
    def tokens_per_s(self) -> float:
        """Tokens read a second."""
        ...


def is_first_rank() -> bool:
    """Say whether this process speaks for the run: the only one, or the first under torchrun."""
    return own_ranks().first


def stderr_console() -> Console:
    """Return a console on stderr; silent on every rank but the first."""
    # a file has no width: rich would take 80 columns and squeeze tables
    width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else LOG_WIDTH
    return Console(stderr=True, highlight=False, quiet=not is_first_rank(), width=width)


def wants_live(console: Console) -> bool:
    """Say whether bars can be redrawn in place: a terminal, and nobody's log."""
    # isatty as well: FORCE_COLOR makes rich take any file for a terminal
    terminal = console.is_terminal and console.file.isatty() and os.environ.get("TERM") != "dumb"
    return terminal and os.environ.get("CI", "").lower() not in ("1", "true")


class ConsoleEvents:
    """Draws a run's events.

    Args:
        console: Where to.
        live: Redraw bars in place; plain lines otherwise.
        initializer: Name of the run's initializer.
    """

    def __init__(self, console: Console, *, live: bool, initializer: str = "init") -> None:
        self.console = console
        self.live = live
        self.initializer = initializer
        self._initialised: Initialisation | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = -1

    def say(self, text: str) -> None:
        """Print one plain line, however long."""
        self.console.print(Text(text), soft_wrap=True)

    def stage_started(self, name: str, reason: str) -> None:
        """Say that a stage begins, and why."""
        self.close()
        self._last_line = -1
        self.console.print(Text.assemble((f"{name:<9}", "bold cyan"), "running", (f"  ({reason})" if reason else "", "dim")))

    def stage_fresh(self, name: str, path: Path) -> None:
        """Say that a stage has nothing to do."""
        self.console.print(Text.assemble((f"{name:<9}", "bold cyan"), ("fresh", "green"), (f"    {display_name(path)}", "dim")))

    def stage_finished(self, name: str, seconds: float, results: Mapping[str, object]) -> None:
        """Close the bar and say how long a stage took and what came out."""
        self.close()
        told = headline(name, results)
        parts = Text.assemble((f"{name:<9}", "bold cyan"), ("done", "green"), f"     {duration(seconds)}", (f"  {told}", "dim"))
        self.console.print(parts, soft_wrap=True)
        if name == "init" and self._initialised is not None:
            show_totals(self.console, self._initialised)

    def progress(self, stage: str, done: int, total: int, text: str) -> None:
        """Move the bar, or print a line when a tenth of the stage has passed."""
        if self.live:
            self._draw(stage, done, total, text)
            return
        tenth = done * LINES_A_STAGE // max(total, 1)
        if tenth != self._last_line or done == total:
            self._last_line = tenth
            self.say(f"{stage:<9}{done}/{total}  {text}")

    def note(self, stage: str, text: str) -> None:
        """Print a fallback or a choice."""
        self.console.print(Text.assemble((f"{stage:<9}", "bold cyan"), ("note", "yellow"), f"     {text}"), soft_wrap=True)

    def layers(self, stage: str, records: list[dict[str, object]]) -> None:
        """Print the layers with the largest error after a stage; what an initialisation won follows when it is published."""
        if records and stage == "quantize":
            self.console.print(worst_quantized_table(records))
        if stage == "init":
            self._initialised = initialisation(records, method=self.initializer)
            if self._initialised is not None:
                show_layers(self.console, self._initialised, heat_map=self.live)

    def initialised(self, records: list[dict[str, object]]) -> None:
        """Print what an initialisation won that was made by an earlier command."""
        self.layers("init", records)
        if self._initialised is not None:
            show_totals(self.console, self._initialised)

    def training(self) -> TrainingDisplay:
        """Return the sink that the training loop reports to."""
        return TrainingDisplay(self)

    def close(self) -> None:
        """Take the live bar away, so that ordinary lines and errors print cleanly."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task = None, None

    def _draw(self, stage: str, done: int, total: int, text: str) -> None:
        if self._bar is None or self._task is None:
            self._bar = Progress(
                TextColumn("{task.description:<8}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
                transient=True,  # the closing line stays, the bar does not
            )
            self._task = self._bar.add_task(stage, total=total, text=text)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, text=text, description=stage)


class TrainingDisplay:
    """Draws the training loop's steps: loss, learning rate, tokens a second, time left.

    Args:
        events: The display of the run that trains.
    """

    def __init__(self, events: ConsoleEvents) -> None:
        self._events = events
        self._total = 0
        self._started = time.monotonic()
        self._first: int | None = None
        self._validation = ""

    def start(self, total_steps: int) -> None:
        """Training begins."""
        self._total, self._started = total_steps, time.monotonic()

    def step(self, metrics: StepReading) -> None:
        """A step is done."""
        if self._first is None:
            self._first = metrics.step - 1  # a resumed run: earlier steps say nothing of this one's pace
        text = f"loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  {metrics.tokens_per_s:,.0f} tokens/s{self._validation}"
        events = self._events
        if events.live:
            events.progress("train", metrics.step, self._total, text)
        elif metrics.step % LINES_A_STAGE == 0 or metrics.step in (self._first + 1, self._total):
            left = (time.monotonic() - self._started) / (metrics.step - self._first) * (self._total - metrics.step)
            events.say(f"train    step {metrics.step}/{self._total}  {text}  {duration(left)} left")

    def validation(self, step: int, loss: float) -> None:
        """The held-out examples were scored."""
        self._validation = f"  validation {loss:.4f}"
        if not self._events.live:
            self._events.say(f"train    step {step}/{self._total}  validation loss {loss:.4f}")

    def note(self, text: str) -> None:
        """Print a choice or a resumption."""
        self._events.note("train", text)


@contextlib.contextmanager
def watching(console: Console | None = None, *, initializer: str = "init") -> Generator[ConsoleEvents]:
    """Yield the display of a run, and leave the terminal clean however the run ends."""
    console = console or stderr_console()
    events = ConsoleEvents(console, live=wants_live(console), initializer=initializer)
    try:
        yield events
    finally:
        events.close()


def headline(stage: str, results: Mapping[str, object]) -> str:
    """Return the results that matter most, as `name value` pairs."""
    names = [name for name in HEADLINES.get(stage, ()) if name in results] or list(results)[:3]
    return "  ".join(f"{name.replace('_', ' ')} {_short(results[name])}" for name in names)


def duration(seconds: float) -> str:
    """Return seconds as people say them: 4.2 s, 3 min 05 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _short(value: object) -> str:
    number = finite_number(value)
    if number is None or isinstance(value, int):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{number:.4g}"
