"""The frame of report.html and the sections on results: table, what was won, training, quantized layers.

The page is one file: styles inside, pictures as data URIs, no script. A content security policy forbids everything else, so that
opening a report can reach nothing, whatever text a model wrote into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import cast

import yaml

from qwha_cli.report import plots, wording
from qwha_cli.report.collect import RunReport
from qwha_cli.report.initialisation import WORST
from qwha_cli.report.layers import worst_layers
from qwha_cli.report.markup import Safe, element, join
from qwha_cli.report.page_details import details_sections, section
from qwha_cli.report.page_initialisation import initialisation_section
from qwha_cli.report.page_pictures import figure, heat_map, picture, plain_table, scrolling
from qwha_cli.report.table import TableRow, number

# Title, unit and text of the columns that every table of rows has.
COLUMNS: Sequence[tuple[str, str, Callable[[TableRow], str]]] = (
    ("Perplexity, answers", "held out", lambda r: wording.perplexity(r.perplexity_answers)),
    ("Perplexity, text", "running text", lambda r: wording.perplexity(r.perplexity_text)),
    ("Exact match", "± standard error", lambda r: wording.with_error(r.exact_match, r.exact_match_stderr)),
    ("Layer error", "mean of outputs", lambda r: wording.percent(r.layer_error)),
    ("Bits", "a weight", lambda r: wording.bits(r.bits_per_weight)),
    ("Size", "MB", lambda r: wording.megabytes(r.megabytes)),
    ("Time", "of the stage", lambda r: wording.duration(r.seconds)),
)
ROW_NAMES: Mapping[str, str] = {
    "16-bit": "16-bit",
    "base": "quantized base",
    "init": "+ initialised",
    "trained": "+ trained",
    "merged": "merged",
}


def page(report: RunReport) -> str:
    """Return report.html."""
    style = resources.files("qwha_cli.report").joinpath("page.css").read_text(encoding="utf-8")
    head = join(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element(
            "meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        ),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{report.name} · qwha report"),
        element("style", Safe(style)),
    )
    body = join(
        _header(report),
        _result(report),
        _wins(report),
        initialisation_section(report),
        _quantized_layers(report),
        _training(report),
        details_sections(report),
        element("footer", "Written by qwha from the run's own files. Sizes count 10⁶ bytes a MB."),
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def summary_line(report: RunReport) -> str:
    """Return what was done in one line, from the resolved recipe; empty where there is none."""
    recipe = yaml.safe_load(report.recipe) if report.recipe else None
    if not isinstance(recipe, Mapping):
        return ""
    model, quantize, adapter, train = (_mapping(recipe, name) for name in ("model", "quantize", "adapter", "train"))
    parts = [
        str(model.get("id", "")),
        f"{str(quantize.get('method', '')).upper()} {quantize.get('bits')} bits, groups of {quantize.get('group_size')}"
        if quantize
        else "",
        f"{quantize['basis']} basis" if quantize.get("basis") else "",
        _adapter(adapter),
        _training_data(train),
    ]
    return " · ".join(part for part in parts if part)


def _adapter(adapter: Mapping[str, object]) -> str:
    if not adapter.get("rank"):
        return ""
    return f"LoRA of rank {adapter['rank']}" if adapter.get("method") == "lora" else f"rank {adapter['rank']}"


def _training_data(train: Mapping[str, object]) -> str:
    data = _mapping(train, "data")
    length = f"{train['steps']} steps" if train.get("steps") else f"{train['epochs']} epochs" if train.get("epochs") else ""
    return f"{length} on {data['format']}" if length and data.get("format") else length


def _mapping(outer: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = outer.get(name)
    return cast(Mapping[str, object], value) if isinstance(value, Mapping) else {}


def _header(report: RunReport) -> Safe:
    newest = max((m.created for m in report.manifests.values()), default="")
    seconds = sum(m.seconds for m in report.manifests.values())
    device = next((str(m.environment["device"]) for m in report.manifests.values() if m.environment.get("device")), "")
    facts = [
        newest[:16].replace("T", " ") + " UTC" if newest else "",
        f"{wording.duration(seconds)} in all" if seconds else "",
        device,
    ]
    return element(
        "header",
        element("p", "Run report", class_="kind"),
        element("h1", report.name),
        element("p", summary_line(report)),
        element("p", " · ".join(f for f in facts if f), class_="kind"),
    )


def _result(report: RunReport) -> Safe:
    warnings = [missing_sentence(report).replace("`", "")] if report.missing else []
    warnings += [f"{stage} was made from an older {' and '.join(names)}; run it again." for stage, names in report.stale.items()]
    parts = [element("p", text, class_="warning") for text in warnings]
    if not report.table:
        return section("Result", *parts, element("p", "No stage has finished, so there is nothing to compare yet."))
    columns = [c for c in COLUMNS if any(c[2](row) != wording.ABSENT for row in report.table)]
    tasks = task_names(report.table)
    heads = [element("th", title, element("small", unit), scope="col") for title, unit, _ in columns]
    heads += [element("th", name, element("small", measure), scope="col") for name, measure in tasks]
    head = element("tr", element("th", "Model", scope="col"), *heads)
    largest = max(
        (math.log(r.perplexity_answers or 1.0) for r in report.table if (r.perplexity_answers or 0.0) > 1.0), default=0.0
    )
    rows = [_table_row(row, columns, tasks, largest) for row in report.table]
    table = element("table", element("thead", head), element("tbody", *rows))
    caption = (
        "Layer error is the squared error of a layer's outputs over calibration inputs, as a share of the outputs themselves. "
        "Bits count everything stored for a quantized weight, adapter included."
    )
    if largest:
        caption = "Bars show the loss on held-out answers. " + caption
    return section("Result", *parts, scrolling(table, "Result"), element("p", caption, class_="caption"))


def missing_sentence(report: RunReport) -> str:
    """Say which stages are not there."""
    names = ", ".join(report.missing)
    return f"Not there yet: {names}. `qwha run RECIPE` makes what is missing and leaves the rest alone."


def task_names(table: Sequence[TableRow]) -> list[tuple[str, str]]:
    """Return every (task, measure) of a table, in order of appearance."""
    return list(dict.fromkeys((task.task, task.measure) for row in table for task in row.tasks))


def task_text(row: TableRow, name: tuple[str, str]) -> str:
    """Return a row's score of a task as text."""
    found = next((t for t in row.tasks if (t.task, t.measure) == name), None)
    return wording.with_error(found.value, found.stderr) if found else wording.ABSENT


def _table_row(
    row: TableRow,
    columns: Sequence[tuple[str, str, Callable[[TableRow], str]]],
    tasks: Sequence[tuple[str, str]],
    largest: float,
) -> Safe:
    cells: list[Safe] = []
    for index, (_, _, text) in enumerate(columns):
        bar = _bar(row.perplexity_answers, largest) if index == 0 else Safe("")
        cells.append(element("td", text(row), bar))
    cells += [element("td", task_text(row, name)) for name in tasks]
    attributes = {"class_": "chosen"} if row.row == "trained" else {}
    return element("tr", element("th", ROW_NAMES[row.row], scope="row"), *cells, **attributes)


def _bar(value: float | None, largest: float) -> Safe:
    if value is None or not math.isfinite(value) or value <= 1 or not largest:
        return Safe("")
    return element("span", class_="bar", style=f"width:{100 * math.log(value) / largest:.1f}%")


def _wins(report: RunReport) -> Safe:
    sentences = wording.wins(report)
    if not sentences:
        return Safe("")
    return section("What it won", element("ul", *(element("li", text) for text in sentences)))


def _training(report: RunReport) -> Safe:
    if not any(number(r.get("loss")) is not None or number(r.get("validation_loss")) is not None for r in report.metrics):
        return Safe("")
    loss = picture(lambda out, theme: plots.loss_curve(report.metrics, out, theme=theme), "Training and validation loss by step")
    last = next((r for r in reversed(report.metrics) if "loss" in r), {})
    facts = [
        f"{last['step']} steps" if "step" in last else "",
        f"{sum(number(r.get('tokens')) or 0 for r in report.metrics):,.0f} tokens",
        f"{wording.duration(report.manifests['train'].seconds)}",
    ]
    return section("Training", figure(loss, ", ".join(f for f in facts if f) + "."))


def _quantized_layers(report: RunReport) -> Safe:
    """Return the layers after quantization; an initialisation shows them before and after instead."""
    if not report.quantized or report.initialised:
        return Safe("")
    caption = "Error of each layer's output after quantization, in per cent of the output."
    rows = [
        [
            str(record.get("name", "")),
            wording.percent(number(record.get("error_ratio")), digits=2),
            f"{number(record.get('sqnr_db')) or 0:.1f}",
            wording.duration(number(record.get("seconds"))),
        ]
        for record in worst_layers(report.quantized, "error_ratio", count=WORST)
    ]
    return section(
        "Layers",
        heat_map(report.quantized, "error_ratio", caption, None),
        element("h3", "Worst layers after quantization"),
        scrolling(plain_table(["Layer", "Error", "SQNR, dB", "Time"], rows), "Worst layers"),
    )
