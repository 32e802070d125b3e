"""The tables that people read at the end of a run: what each step did to the model, and the layers that suffered most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from qwha_cli.report.initialisation import WORST, recovered
from qwha_cli.report.layers import common_prefix, entries_of_rows, finite_number, worst_layers

NOT_MEASURED = "–"
TITLES = {"16-bit": "16-bit", "base": "{bits} base", "init": "+ init", "trained": "+ trained", "merged": "merged"}


def results_table(rows: Sequence[Mapping[str, object]], *, bits: int | None = None) -> Table:
    """Return the table of a run.

    Args:
        rows: Records with `row` and any of perplexity_answers, perplexity_text, exact_match, exact_match_stderr (fractions),
            layer_error, bits_per_weight, megabytes (10^6 bytes), seconds, tasks (name to scores). What is absent or None was not
            measured.
        bits: Width of the quantized base, for its row's name.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")  # fits 80 columns
    table.add_column("")
    tasks = task_names(rows)
    headings = [
        "perplexity\nanswers",
        "perplexity\ntext",
        "exact\nmatch %",
        *tasks,
        "layer\nerror",
        "bits/\nweight",
        "MB",
        "seconds",
    ]
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        name = str(row["row"])
        title = TITLES.get(name, name).format(bits=f"{bits}-bit" if bits else "low-bit")
        style = "bold" if name == "trained" else None
        cells = [number_cell(row.get(key), ".2f") for key in ("perplexity_answers", "perplexity_text")]
        cells.append(percent_cell(row.get("exact_match"), row.get("exact_match_stderr")))
        cells += [task_cell(row, task) for task in tasks]
        cells += [number_cell(row.get("layer_error"), ".4f"), number_cell(row.get("bits_per_weight"), ".2f")]
        cells += [number_cell(row.get("megabytes"), ",.0f"), number_cell(row.get("seconds"), ",.0f")]
        table.add_row(title, *cells, style=style)
    return table


def worst_quantized_table(layers: Sequence[Mapping[str, object]], *, count: int = 5) -> Table:
    """Return the layers with the largest output error after quantization.

    Args:
        layers: Records of 1-quantize/layers.jsonl.
        count: How many to show.
    """
    columns = {"error_ratio": ".4f", "sqnr_db": ".1f", "bits_per_weight": ".2f", "seconds": ".1f"}
    worst = worst_layers(layers, "error_ratio", count=count)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"worst {len(worst)} of {len(layers)} layers", title_justify="left")
    table.add_column("layer")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for layer in worst:
        table.add_row(str(layer.get("name", "?")), *(number_cell(layer.get(column), form) for column, form in columns.items()))
    return table


def worst_initialised_table(layers: Sequence[Mapping[str, object]], *, count: int = WORST) -> Table:
    """Return the layers with the largest output error after initialisation; fits 80 columns.

    Args:
        layers: Records of 2-init/layers.jsonl.
        count: How many to show.
    """
    worst = worst_layers(layers, "error_after", count=count)
    prefix = common_prefix(layers) if len(layers) > 1 else ""
    title = f"worst {len(worst)} of {len(layers)} layers" + (f", names after {prefix}" if prefix else "")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    for heading in ("error\nzero → init", "recov-\nered", "entries", "a row: min/\nmedian/max", "time\ns"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in worst:
        before, after = (finite_number(layer.get(name)) for name in ("error_zero", "error_after"))
        share = recovered(before, after)
        table.add_row(
            str(layer.get("name", "?")).removeprefix(prefix),
            f"{number_cell(before, '.4f')} → {number_cell(after, '.4f')}",
            NOT_MEASURED if share is None else f"{100 * share:.0f} %",
            number_cell(layer.get("entries"), ",d"),
            entries_of_rows(layer, "/"),
            number_cell(layer.get("seconds"), ".1f"),
        )
    return table


def task_names(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the names of the tasks that any row has a score of, in order of appearance."""
    found: dict[str, None] = {}
    for row in rows:
        tasks = row.get("tasks")
        if isinstance(tasks, Mapping):
            found |= dict.fromkeys(str(name) for name in tasks)
    return list(found)


def task_cell(row: Mapping[str, object], task: str) -> str:
    """Return a task's score as per cent; of several metrics length-normalised accuracy, else the first, as the papers do."""
    tasks = row.get("tasks")
    scores: object = tasks.get(task) if isinstance(tasks, Mapping) else None
    if isinstance(scores, list | tuple):
        normalised = [s for s in scores if isinstance(s, Mapping) and s.get("metric") == "acc_norm"]
        scores = (normalised or list(scores) or [None])[0]
    if isinstance(scores, Mapping):
        return percent_cell(scores.get("value"), scores.get("stderr"))
    return percent_cell(scores, None)


def number_cell(value: object, form: str) -> str:
    """Return a number in a format, or a dash where there is none."""
    number = finite_number(value)
    if number is None:
        return NOT_MEASURED
    return format(int(number) if form.endswith("d") else number, form)


def percent_cell(value: object, stderr: object) -> str:
    """Return a fraction as per cent with its standard error."""
    number, error = finite_number(value), finite_number(stderr)
    if number is None:
        return NOT_MEASURED
    return f"{100 * number:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")
