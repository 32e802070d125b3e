"""Numbers as people read them, and the sentences that say what a run won or lost.

The sentences are made from the table alone and claim no more than it holds: a share of a gap is a share of the difference in
loss (the logarithm of perplexity), and a change of exact match within two standard errors is called no difference.
"""

from __future__ import annotations

import math

from qwha_cli.report.collect import RunReport
from qwha_cli.report.table import TableRow, number

ABSENT = "–"
# No line may break between a number and its unit.
_GAP = "\u00a0"


def perplexity(value: float | None) -> str:
    """Three significant digits, more for large whole numbers, an order of magnitude for absurd ones."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "∞"
    if value >= 1e6:
        return f"10^{math.log10(value):.1f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{2 if value < 100 else 1}f}"


def percent(value: float | None, *, digits: int = 1) -> str:
    """A fraction as a percentage, with more digits below one per mille so that a small error does not read as none."""
    if value is None:
        return ABSENT
    if value and abs(value) < 5 * 10 ** -(digits + 3):
        return f"{100 * value:.1g}{_GAP}%"
    return f"{100 * value:.{digits}f}{_GAP}%"


def with_error(value: float | None, stderr: float | None) -> str:
    """A fraction as a percentage with its standard error."""
    if value is None or stderr is None:
        return percent(value)
    return f"{100 * value:.1f}{_GAP}±{_GAP}{100 * stderr:.1f}{_GAP}%"


def bits(value: float | None) -> str:
    """Bits per weight, two decimals."""
    return ABSENT if value is None else f"{value:.2f}"


def megabytes(value: float | None) -> str:
    """A size in MB (10^6 bytes)."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def scientific(value: float) -> str:
    """Two significant digits, with a power of ten where a plain number would be long."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.2g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}{_GAP}·{_GAP}10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def duration(seconds: float | None) -> str:
    """Milliseconds, seconds below two minutes, minutes below two hours, hours above."""
    if seconds is None:
        return ABSENT
    if seconds < 0.1:
        return f"{1000 * seconds:.0f}{_GAP}ms"
    if seconds < 120:
        return f"{seconds:.0f}{_GAP}s" if seconds >= 10 else f"{seconds:.1f}{_GAP}s"
    return f"{seconds / 60:.1f}{_GAP}min" if seconds < 7200 else f"{seconds / 3600:.1f}{_GAP}h"


def size(count: int) -> str:
    """A number of bytes with a unit of 10^3."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f}{_GAP}{unit}"
    return f"{count}{_GAP}B"


def wins(report: RunReport) -> list[str]:
    """Return what the run achieved, or did not, one sentence each."""
    rows = {row.row: row for row in report.table}
    sentences = [
        _gap(rows, "perplexity_answers", "held-out answers"),
        _gap(rows, "perplexity_text", "running text"),
        _exact_match(rows),
        _layers(report),
        _space(report, rows),
        _merge(report),
    ]
    return [sentence for sentence in sentences if sentence]


def _gap(rows: dict[str, TableRow], field: str, what: str) -> str:
    """What became of the perplexity lost by quantization."""
    found = {name: getattr(row, field) for name, row in rows.items() if getattr(row, field) is not None}
    if "base" not in found:
        return ""
    last = next((name for name in ("trained", "init") if name in found), None)
    base = found["base"]
    if last is None:
        return f"Perplexity on {what} is {perplexity(base)} after quantization" + (
            f", against {perplexity(found['16-bit'])} in 16 bits." if "16-bit" in found else "."
        )
    value = found[last]
    verb = "fell" if value < base else "rose"
    text = f"Perplexity on {what} {verb} from {perplexity(base)} (quantized) to {perplexity(value)} ({_named(last)})"
    text += _against_original(found, base, value)
    if last == "trained" and "init" in found:
        text += f" Initialisation alone, before any training, gave {perplexity(found['init'])}."
    return text


def _against_original(found: dict[str, float], base: float, value: float) -> str:
    original = found.get("16-bit")
    if original is None or not original < base:
        return "."
    if value < original:
        return f". That is below the {perplexity(original)} of the 16-bit model, which was not fine-tuned on this data."
    if value >= base:
        return f"; the 16-bit model has {perplexity(original)}."
    share = (math.log(base) - math.log(value)) / (math.log(base) - math.log(original))
    return f". That closes {100 * share:.0f}{_GAP}% of the gap in loss to the 16-bit model's {perplexity(original)}."


def _named(row: str) -> str:
    return {"trained": "after training", "init": "after initialisation"}[row]


def _exact_match(rows: dict[str, TableRow]) -> str:
    base, trained = rows.get("base"), rows.get("trained")
    if base is None or trained is None or base.exact_match is None or trained.exact_match is None:
        return ""
    difference = trained.exact_match - base.exact_match
    spread = math.hypot(base.exact_match_stderr or 0.0, trained.exact_match_stderr or 0.0)
    before, after = (with_error(row.exact_match, row.exact_match_stderr) for row in (base, trained))
    asked = f" ({trained.n} questions)" if trained.n else ""
    if abs(difference) <= 2 * spread:
        return f"Exact match went from {before} to {after}{asked}: no difference beyond two standard errors."
    return f"Exact match {'rose' if difference > 0 else 'fell'} from {before} to {after}{asked}."


def _layers(report: RunReport) -> str:
    pairs = [
        (before, after)
        for record in report.initialised
        if (before := number(record.get("error_zero"))) is not None and (after := number(record.get("error_after"))) is not None
    ]
    if not pairs:
        return ""
    before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    better = sum(b > a for b, a in pairs)
    return (
        f"Initialisation took the mean error of the layers' outputs from {percent(before)} to {percent(after)}, "
        f"measured with the earlier blocks corrected; {better} of {len(pairs)} layers improved."
    )


def _space(report: RunReport, rows: dict[str, TableRow]) -> str:
    original = rows.get("16-bit")
    small = rows.get("trained") or rows.get("init") or rows.get("base")
    if original is None or small is None or not original.megabytes or not small.megabytes:
        return ""
    adapter = "" if small.row == "base" else ", adapter included"
    cost = f"a quantized weight costs {bits(small.bits_per_weight)} bits{adapter}{_vocabulary(report)}."
    ratio = original.megabytes / small.megabytes
    if ratio < 1.05:
        return (
            f"The weights take {megabytes(small.megabytes)}{_GAP}MB, no less than the 16-bit model's "
            f"{megabytes(original.megabytes)}{_GAP}MB: the model or its groups are too small; {cost}"
        )
    return (
        f"The weights take {megabytes(small.megabytes)}{_GAP}MB instead of {megabytes(original.megabytes)}{_GAP}MB, "
        f"{ratio:.1f} times less; {cost}"
    )


def _vocabulary(report: RunReport) -> str:
    """What embedding and head take, where they are not left in 16 bits."""
    manifest = report.manifests.get("quantize")
    stored = number(manifest.results.get("vocabulary_bits_per_weight")) if manifest else None
    return f", of embedding and head {bits(stored)} bits" if stored is not None else ""


def _merge(report: RunReport) -> str:
    difference, divergence = number(report.check.get("max_logit_difference")), number(report.check.get("kl"))
    if difference is None or divergence is None:
        return ""
    prompts = f" over {report.check['prompts']} prompts" if "prompts" in report.check else ""
    if difference == 0:
        return f"The merged model gives the logits of base plus adapter to the bit{prompts}."
    return (
        f"The merged model differs from base plus adapter by at most {scientific(difference)} in a logit "
        f"and by a divergence of {scientific(divergence)} nats{prompts}."
    )
