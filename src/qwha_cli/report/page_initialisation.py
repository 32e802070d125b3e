"""The initialisation in both reports: verdict, what it won against other initializers, numbers, pictures, the worst layers."""

from __future__ import annotations

from collections.abc import Mapping

from qwha_cli.report import plots, wording
from qwha_cli.report.collect import RunReport
from qwha_cli.report.entries import EntriesHistogram
from qwha_cli.report.initialisation import WORST, Initialisation, display_name, initialisation, recovered
from qwha_cli.report.layers import entries_of_rows, finite_number, worst_layers
from qwha_cli.report.markup import Safe, element
from qwha_cli.report.page_details import section
from qwha_cli.report.page_pictures import figure, heat_map, picture, plain_table, scrolling
from qwha_cli.report.table import number

RIVAL_TITLES = ("Initializer", "Mean layer error", "Recovered", "Layers")
WORST_TITLES = ("Layer", "Error, zero", "Error, init", "Recovered", "Entries", "Min – median – max a row", "Time")


def found_initialisation(report: RunReport) -> Initialisation | None:
    """Return what a run's initialisation won, or None where it has none."""
    manifest = report.manifests.get("init")
    settings = manifest.settings.get("init") if manifest else None
    method = str(settings.get("method", "init")) if isinstance(settings, Mapping) else "init"
    return initialisation(report.initialised, method=method)


def initialisation_section(report: RunReport) -> Safe:
    """Return the section of report.html; empty where no layer was initialised."""
    found = found_initialisation(report)
    if found is None:
        return Safe("")
    pairs = [part for name, text in number_lines(report, found) for part in (element("dt", name), element("dd", text))]
    rivals = rival_rows(found)
    said, reason = verdict_texts(found)
    worst = worst_rows(found)
    parts = [
        element("p", element("strong", said), f" {reason}"),
        scrolling(plain_table(RIVAL_TITLES, rivals, chosen=len(rivals) - 1), "Initializers"),
        element("p", rivals_caption(found), class_="caption"),
        element("dl", *pairs),
        *_pictures(found),
        element("h3", f"The {len(worst)} worst layers after initialisation"),
        scrolling(plain_table(WORST_TITLES, worst), "Worst layers"),
    ]
    return section("Initialisation", *parts)


def verdict_texts(found: Initialisation) -> tuple[str, str]:
    """Return the verdict and its reason, each a sentence, with errors in per cent like everything in the reports."""
    verdict = found.verdict(lambda error: wording.percent(error, digits=2))
    return f"{verdict.said[0].upper()}{verdict.said[1:]}.", verdict.reason


def rivals_caption(found: Initialisation) -> str:
    """Say what the table of initializers compares."""
    text = "Mean over the layers of the error over the calibration text, as a share of the outputs."
    text += " All have the same bytes a layer." if found.rivals else ""
    for rival in found.rivals:
        if rival.layers < len(found.records):
            text += (
                f" {display_name(rival.name)} was measured on {rival.layers} layers only, where {display_name(found.method)} has "
                f"{wording.percent(rival.own_mean, digits=2)}."
            )
    return text


def rival_rows(found: Initialisation) -> list[list[str]]:
    """Return the table of initializers: zero first, the one that was used last."""
    entries = [("zero", found.zero_mean, len(found.records)), *((r.name, r.mean, r.layers) for r in found.rivals)]
    entries.append((found.method, found.mean, len(found.records)))
    rows: list[list[str]] = []
    for name, mean, layers in entries:
        share = 0.0 if name == "zero" else recovered(found.zero_mean, mean)
        # a mean over other layers has no share in this error
        share = share if layers == len(found.records) else None
        rows.append([display_name(name), wording.percent(mean, digits=2), wording.percent(share, digits=0), f"{layers}"])
    return rows


def number_lines(report: RunReport, found: Initialisation) -> list[tuple[str, str]]:
    """Return (name, text) of the numbers that stand beside the pictures."""
    results = report.manifests["init"].results if "init" in report.manifests else {}
    worst = worst_layers(found.records, "error_after", count=1)[0]
    entries = sum(int(number(record.get("entries")) or 0) for record in found.records)
    lines = [("Layers", f"{len(found.records)}" + (f", {found.worse} of them worse than with zero" if found.worse else ""))]
    lines.append(("Largest error", f"{wording.percent(number(worst['error_after']), digits=2)}, {worst.get('name', '')}"))
    lines += [("Entries", f"{entries:,}")] if entries else []
    if found.rows and found.rows.without_entries:
        lines.append(("Rows without entries", f"{found.rows.without_entries:,} of {sum(found.rows.counts):,}"))
    for key, name in (("adapter_bits_per_entry", "Bits an entry"), ("bits_per_weight", "Bits a weight")):
        value = number(results.get(key))
        lines += [(name, f"{value:.2f}, adapter included" if key == "bits_per_weight" else f"{value:.2f}")] if value else []
    return lines


def worst_rows(found: Initialisation) -> list[list[str]]:
    """Return the layers with the largest error after initialisation as texts."""
    rows: list[list[str]] = []
    for record in worst_layers(found.records, "error_after", count=WORST):
        before, after = finite_number(record["error_zero"]), finite_number(record["error_after"])
        entries = number(record.get("entries"))
        rows.append(
            [
                str(record.get("name", "")),
                wording.percent(before, digits=2),
                wording.percent(after, digits=2),
                wording.percent(recovered(before, after), digits=0),
                wording.ABSENT if entries is None else f"{entries:,.0f}",
                entries_of_rows(record, " – "),
                wording.duration(number(record.get("seconds"))),
            ]
        )
    return rows


def _pictures(found: Initialisation) -> list[Safe]:
    errors = [finite_number(record[key]) for record in found.records for key in ("error_zero", "error_after")]
    known = [error for error in errors if error is not None and error > 0]
    limits = (min(known), max(known)) if known else None
    before = "Before: the error of each layer's output with a zero adapter, in per cent of the output."
    parts = [
        heat_map(found.records, "error_zero", before, limits),
        heat_map(found.records, "error_after", "After initialisation, in the same colours.", limits),
    ]
    return parts + ([_rows_figure(found.rows)] if found.rows and found.rows.counts else [])


def _rows_figure(rows: EntriesHistogram) -> Safe:
    drawn = picture(lambda out, theme: plots.entries_histogram(rows, out, theme=theme), "Histogram of entries per row")
    return figure(drawn, f"How many entries of the adapter the {sum(rows.counts):,} rows of all layers got.")
