"""report.md: the same account as report.html for terminals, reviews and pull requests; pictures are linked, not embedded."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwha_cli.report import wording
from qwha_cli.report.collect import STAGE_FOLDERS, RunReport
from qwha_cli.report.page import COLUMNS, ROW_NAMES, missing_sentence, summary_line, task_names, task_text
from qwha_cli.report.page_details import counted, cut, environment_lines, grouped, shown_samples, verdict
from qwha_cli.report.page_initialisation import (
    RIVAL_TITLES,
    WORST_TITLES,
    found_initialisation,
    number_lines,
    rival_rows,
    rivals_caption,
    verdict_texts,
    worst_rows,
)

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#])")
_PICTURES = (
    ("init", "heatmap.png", "Layer errors after initialisation"),
    ("init", "entries.png", "Rows by their number of entries"),
    ("train", "loss.png", "Loss"),
)


def markdown(report: RunReport) -> str:
    """Return report.md."""
    parts = [f"# {plain(report.name)}", plain(summary_line(report))]
    if report.missing:
        parts.append(f"> {missing_sentence(report)}")
    parts += [f"> {stage} was made from an older {' and '.join(names)}; run it again." for stage, names in report.stale.items()]
    parts += ["## Result", _table(report)]
    sentences = wording.wins(report)
    if sentences:
        parts += ["## What it won", "\n".join(f"- {plain(sentence)}" for sentence in sentences)]
    parts += _initialisation(report)
    loss = _pictures(report, "train")
    parts += ["## Training", *loss] if loss else []
    parts += _samples(report)
    notes = [f"- **{stage}**: {plain(note)}" for stage, note in report.notes()] or ["None."]
    parts += ["## Notes and fallbacks", "\n".join(notes)]
    if report.recipe:
        parts += ["## Recipe", fenced(report.recipe, language="yaml")]
    environment = [f"- {plain(name)}: {plain(value)}" for name, value in environment_lines(report.manifests)]
    if environment:
        parts += ["## Environment", "\n".join(environment)]
    parts += _files(report)
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """Return a text with everything escaped that Markdown or HTML would act on, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def fenced(text: str, *, language: str = "") -> str:
    """Return a text as a code block whose fence is longer than any inside it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _table(report: RunReport) -> str:
    if not report.table:
        return "No stage has finished, so there is nothing to compare yet."
    columns = [c for c in COLUMNS if any(c[2](row) != wording.ABSENT for row in report.table)]
    tasks = task_names(report.table)
    titles = [
        "model",
        *(f"{title} ({unit})" for title, unit, _ in columns),
        *(plain(f"{name} {measure}") for name, measure in tasks),
    ]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for row in report.table:
        cells = [ROW_NAMES[row.row], *(text(row) for _, _, text in columns), *(task_text(row, name) for name in tasks)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _initialisation(report: RunReport) -> list[str]:
    found = found_initialisation(report)
    if found is None:
        return []
    said, reason = verdict_texts(found)
    numbers = "\n".join(f"- {plain(name)}: {plain(text)}" for name, text in number_lines(report, found))
    return [
        "## Initialisation",
        f"**{plain(said)}** {plain(reason)}",
        _rows(RIVAL_TITLES, rival_rows(found)),
        plain(rivals_caption(found)),
        numbers,
        *_pictures(report, "init"),
        "### Worst layers after initialisation",
        _rows(WORST_TITLES, worst_rows(found)),
    ]


def _pictures(report: RunReport, stage: str) -> list[str]:
    there = [(file, text) for of, file, text in _PICTURES if of == stage and (report.folder(stage) / file).is_file()]
    return [f"![{text}]({STAGE_FOLDERS[stage]}/{file})" for file, text in there]


def _rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(plain(cell) for cell in row)} |" for row in rows])


def _samples(report: RunReport) -> list[str]:
    shown = shown_samples(report)
    if not shown:
        return []
    parts = [f"## Samples\n\n{counted(report)}, none chosen by hand."]
    for sample in shown:
        parts.append(f"**Question.** {plain(cut(sample.question))}\n\n**Expected.** {plain(cut(sample.expected))}")
        for answer in grouped(sample.answers):
            parts.append(f"{answer.row}, {plain(verdict(answer)) or 'not judged'}:\n\n{fenced(cut(answer.text) or '(nothing)')}")
    return parts


def _files(report: RunReport) -> list[str]:
    parts: list[str] = []
    for stage, manifest in report.manifests.items():
        lines = ["| file | size | sha256 |", "|---|---:|---|"]
        lines += [
            f"| {plain(name)} | {wording.size(record.bytes)} | `{record.sha256}` |" for name, record in manifest.files.items()
        ]
        parts.append(f"### {STAGE_FOLDERS[stage]}\n\n" + "\n".join(lines))
    return ["## Files", *parts] if parts else []
