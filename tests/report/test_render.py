"""The written reports: complete, self-contained, and safe against whatever a model or a file name says."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwha_cli.report.collect import collect
from qwha_cli.report.markup import Safe, element, join
from qwha_cli.report.page_initialisation import found_initialisation, rival_rows, verdict_texts, worst_rows
from qwha_cli.report.render import write_report
from support.run_folder import make_run

EVIL = '"><script>alert(1)</script><img src="https://example.org/x.png" onerror="alert(2)">]]>`````|'
LOADING = {"src", "srcset", "href", "action", "data", "poster", "background", "style", "content"}


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside of the style sheet."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in {"img", "source", "meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "demo", blocks=4)
    write_report(run)
    return run


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "<b>evil & co", blocks=2, evil=EVIL)
    write_report(run)
    return run


def attributes(page: Elements) -> Iterator[tuple[str, str, str]]:
    for tag, found in page.found:
        for name, value in found.items():
            yield tag, name, value or ""


def test_every_section_is_in_both_reports(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    everything = [
        "Result",
        "What it won",
        "Initialisation",
        "Training",
        "Samples",
        "Notes and fallbacks",
        "Recipe",
        "Environment",
        "Files",
    ]
    assert headings == everything
    text = (run / "report.md").read_text(encoding="utf-8")
    # the fixture's run has no loss.png to link
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [name for name in everything if name != "Training"]


def test_the_numbers_of_the_table_are_in_both_reports(run: Path) -> None:
    page, text = ((run / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    for number in ("31.70", "12.40", "1.71", "44.0\u00a0±\u00a03.5\u00a0%", "2.28", "3.18"):
        assert number in page
        assert number in text
    assert page.count('<th scope="row">quantized base</th>') == 1


def test_every_file_of_every_stage_is_listed_with_its_full_hash(run: Path) -> None:
    page, text = ((run / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    hashes = [record.sha256 for manifest in collect(run).manifests.values() for record in manifest.files.values()]
    assert len(hashes) >= 12
    assert all(value in page and value in text for value in hashes)


def test_html_is_well_formed_and_loads_nothing_from_outside(run: Path, evil_run: Path) -> None:
    for folder in (run, evil_run):
        page = Elements((folder / "report.html").read_text(encoding="utf-8"))
        assert page.open == []
        for tag, name, value in attributes(page):
            assert not name.startswith("on"), (tag, name)
            if name in LOADING and tag != "meta":
                assert value.startswith("data:image/png;base64,") or (
                    name == "style" and re.fullmatch(r"width:[\d.]+%|max-width:\d+px", value)
                )
        tags = {tag for tag, _ in page.found}
        assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base", "a"})
        policy = [found["content"] for tag, found in page.found if found.get("http-equiv") == "Content-Security-Policy"]
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_style_sheet_refers_to_nothing(run: Path) -> None:
    style = re.findall(r"<style>(.*?)</style>", (run / "report.html").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert "http" not in style[0]


def test_text_of_models_files_and_recipes_is_shown_and_never_acts(evil_run: Path) -> None:
    page = (evil_run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page.lower()
    assert "<b>" not in page
    # still there for the reader: as a question, an answer, a note, a layer's name, in the recipe and in the title
    shown = "".join(Elements(page).text)
    assert shown.count(EVIL) >= 12
    assert "<b>evil & co" in shown
    assert html.escape(EVIL) in page


def test_markdown_holds_no_html_outside_of_code(evil_run: Path) -> None:
    text = (evil_run / "report.md").read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,})[a-z]*\n.*?\n\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "\\<script\\>" in outside
    assert not re.search(r"(?<!\\)<", outside)


def test_both_colour_schemes_have_their_pictures(run: Path) -> None:
    page = Elements((run / "report.html").read_text(encoding="utf-8"))
    dark = [found for tag, found in page.found if tag == "source"]
    light = [found for tag, found in page.found if tag == "img"]
    assert len(dark) == len(light) == 4  # loss, two heat maps, entries
    assert all(found["media"] == "(prefers-color-scheme: dark)" for found in dark)
    assert all(found["alt"] for found in light)
    assert {found["srcset"] for found in dark}.isdisjoint({found["src"] for found in light})


def shown(folder: Path) -> str:
    """Return the text of a run's page, with ordinary spaces."""
    return "".join(Elements((folder / "report.html").read_text(encoding="utf-8")).text).replace("\u00a0", " ")


def written(folder: Path) -> str:
    """Return the text of a run's Markdown, with ordinary spaces and without escapes."""
    return (folder / "report.md").read_text(encoding="utf-8").replace("\u00a0", " ").replace("\\", "")


def compared(root: Path, compare: dict[str, float | None], *, drop: str = "") -> Path:
    """Write a run whose layers were also initialised by others, with a field left out."""
    run = make_run(root, stages=("quantize", "init"), blocks=2)
    path = run / "2-init" / "layers.jsonl"
    records = [json.loads(line) | {"compare": compare} for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({key: value for key, value in record.items() if key != drop}) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    write_report(run)
    return run


def test_the_initialisation_is_in_both_reports_with_verdict_totals_and_the_ten_worst_layers(run: Path) -> None:
    found = found_initialisation(collect(run))
    assert found is not None
    said, reason = verdict_texts(found)
    for text in (shown(run), written(run)):
        assert said in text
        assert reason.replace("\u00a0", " ") in text
        assert "pursuit" in text
        assert "model.layers.0.self_attn.v_proj" in text
    assert len(worst_rows(found)) == 10


def test_rivals_stand_between_zero_and_the_initializer_used(tmp_path: Path) -> None:
    run = compared(tmp_path / "demo", {"cloq": 0.0146, "zero": 0.5, "unmeasured": None})
    found = found_initialisation(collect(run))
    assert found is not None
    assert [row[0] for row in rival_rows(found)] == ["zero", "CLoQ", "pursuit"]
    for text in (shown(run), written(run)):
        assert "1.46 %" in text
        assert "All have the same bytes a layer." in text


def test_without_rivals_nothing_is_said_of_equal_bytes(run: Path) -> None:
    assert "same bytes" not in shown(run)


def test_layers_without_a_histogram_are_reported_without_its_picture(tmp_path: Path) -> None:
    run = compared(tmp_path / "old", {}, drop="entries_histogram")
    page = Elements((run / "report.html").read_text(encoding="utf-8"))
    assert [found["alt"] for tag, found in page.found if tag == "img" and "Histogram" in str(found["alt"])] == []
    assert "worst layers after initialisation" in "".join(page.text)


def test_layers_without_errors_make_no_section(tmp_path: Path) -> None:
    assert "Initialisation" not in shown(compared(tmp_path / "bare", {}, drop="error_after")).replace("+ initialised", "")


@pytest.mark.parametrize("count", range(6))
def test_a_run_stopped_after_any_stage_can_be_reported(tmp_path: Path, count: int) -> None:
    stages = ("quantize", "init", "train", "merge", "eval")
    run = make_run(tmp_path / "partial", stages=stages[:count], blocks=2)
    paths = write_report(run)
    missing = [stage for stage in ("quantize", "init", "train", "eval", "merge") if stage not in stages[:count]]
    for path in (paths.html, paths.markdown):
        text = path.read_text(encoding="utf-8")
        assert (f"Not there yet: {', '.join(missing)}." in text) == bool(missing)
    assert Elements(paths.html.read_text(encoding="utf-8")).open == []


def test_writing_again_replaces_and_leaves_nothing_else_behind(run: Path) -> None:
    before = sorted(path.name for path in run.iterdir())
    first = (run / "report.html").read_bytes()
    write_report(run)
    assert sorted(path.name for path in run.iterdir()) == before
    assert (run / "report.html").read_bytes() == first


def test_equal_answers_are_shown_once_under_their_rows_names(run: Path) -> None:
    shown = "".join(Elements((run / "report.html").read_text(encoding="utf-8")).text)
    assert "trained, merged" in shown
    assert "The first 6 of 8 questions" in shown


def test_elements_escape_text_and_attributes_but_not_what_they_made() -> None:
    inner = element("b", "a < b")
    assert inner == "<b>a &lt; b</b>"
    assert element("p", inner, "&", class_='x" y') == '<p class="x&quot; y"><b>a &lt; b</b>&amp;</p>'
    assert element("img", src="a", data_x="1") == '<img src="a" data-x="1">'
    assert isinstance(join(inner, "<"), Safe)
    assert join(inner, "<", between="") == "<b>a &lt; b</b>&lt;"
