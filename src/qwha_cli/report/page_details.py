"""The sections of report.html that back the results up: samples, notes, recipe, environment, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwha_cli.artifacts.manifest import Manifest
from qwha_cli.report import wording
from qwha_cli.report.collect import STAGE_FOLDERS, RunReport
from qwha_cli.report.markup import Safe, element, join
from qwha_cli.report.samples import Answer, Sample

SAMPLES = 6
# A model that repeats itself can fill pages; what is cut is counted.
LONGEST_ANSWER = 900


def section(title: str, *parts: Safe) -> Safe:
    """Return a section: its title in the margin, its parts beside it."""
    return element("section", element("h2", title), element("div", *parts))


def details_sections(report: RunReport) -> Safe:
    """Return samples, notes, recipe, environment and files."""
    return join(_samples(report), _notes(report), _recipe(report), _environment(report), _files(report))


def shown_samples(report: RunReport) -> list[Sample]:
    """Return the first samples of every measurement."""
    shown: list[Sample] = []
    for name in dict.fromkeys(sample.measurement for sample in report.samples):
        shown += [sample for sample in report.samples if sample.measurement == name][:SAMPLES]
    return shown


def counted(report: RunReport) -> str:
    """Say how many of the questions are shown."""
    shown, total = len(shown_samples(report)), len(report.samples)
    return f"All {total} questions" if shown == total else f"The first {shown} of {total} questions"


def grouped(answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers with equal ones under all their rows' names; the merged model usually says what the trained one does."""
    groups: dict[tuple[str, bool | None, str | None], list[str]] = {}
    for answer in answers:
        groups.setdefault((answer.text, answer.correct, answer.found), []).append(answer.row)
    return [Answer(", ".join(rows), *group) for group, rows in groups.items()]


def verdict(answer: Answer) -> str:
    """Say whether an answer is right, and where it is not, what was taken for it; empty where nothing judged it."""
    if answer.correct is None:
        return ""
    return "right" if answer.correct else f"wrong: {answer.found}" if answer.found else "wrong"


def cut(text: str) -> str:
    """Return a text, shortened where it is very long, with the number of characters left out."""
    left_out = len(text) - LONGEST_ANSWER
    return text if left_out <= 0 else f"{text[:LONGEST_ANSWER]} … ({left_out} more characters)"


def _samples(report: RunReport) -> Safe:
    shown = shown_samples(report)
    if not shown:
        return Safe("")
    caption = f"{counted(report)}, in the order of the evaluation; none chosen by hand."
    return section("Samples", *(_sample(sample) for sample in shown), element("p", caption, class_="caption"))


def _sample(sample: Sample) -> Safe:
    return element(
        "div",
        element("p", cut(sample.question), class_="question"),
        element("p", f"Expected: {cut(sample.expected)}", class_="expected"),
        element("div", *(_answer(answer) for answer in grouped(sample.answers)), class_="answers"),
        class_="sample",
    )


def _answer(answer: Answer) -> Safe:
    colour = {True: "answer right", False: "answer wrong", None: "answer"}[answer.correct]
    return element(
        "div",
        element("h4", answer.row, element("span", cut(verdict(answer)))),
        element("p", cut(answer.text) or "(nothing)"),
        class_=colour,
    )


def _notes(report: RunReport) -> Safe:
    notes = report.notes()
    if not notes:
        return section(
            "Notes and fallbacks", element("p", "None: every stage did what the recipe asked for, with nothing replaced.")
        )
    items = [element("li", element("strong", f"{stage}: "), note) for stage, note in notes]
    return section("Notes and fallbacks", element("ul", *items))


def _recipe(report: RunReport) -> Safe:
    if not report.recipe:
        return Safe("")
    text = element("pre", element("code", report.recipe))
    return section("Recipe", element("details", element("summary", "Resolved recipe, as it ran"), text))


def environment_lines(manifests: Mapping[str, Manifest]) -> list[tuple[str, str]]:
    """Return (name, value) of the environment; where stages ran in different ones, each value says which stage it is of."""
    names = list(dict.fromkeys(name for m in manifests.values() for name in m.environment))
    lines: list[tuple[str, str]] = []
    for name in names:
        values = {stage: _flat(m.environment[name]) for stage, m in manifests.items() if name in m.environment}
        if len(set(values.values())) == 1:
            lines.append((name, next(iter(values.values()))))
        else:
            lines.append((name, "; ".join(f"{stage}: {value}" for stage, value in values.items())))
    return lines


def _flat(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return "unknown" if value is None else str(value)


def _environment(report: RunReport) -> Safe:
    lines = environment_lines(report.manifests)
    if not lines:
        return Safe("")
    pairs = [part for name, value in lines for part in (element("dt", name), element("dd", value))]
    return section("Environment", element("dl", *pairs))


def _files(report: RunReport) -> Safe:
    parts: list[Safe] = []
    for stage, manifest in report.manifests.items():
        total = sum(record.bytes for record in manifest.files.values())
        rows = [
            element(
                "tr",
                element("td", name, class_="words"),
                element("td", wording.size(record.bytes)),
                element("td", element("span", record.sha256, class_="hash")),
            )
            for name, record in manifest.files.items()
        ]
        head = element("tr", *(element("th", title, scope="col") for title in ("File", "Size", "SHA-256")))
        table = element("table", element("thead", head), element("tbody", *rows))
        title = f"{STAGE_FOLDERS[stage]} · {len(rows)} files, {wording.size(total)} · key {manifest.key[:12]}"
        parts.append(element("details", element("summary", title), element("div", table, class_="scroll")))
    return section("Files", *parts) if parts else Safe("")
