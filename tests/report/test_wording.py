"""Sentences claim what the numbers hold, whichever way they went."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qwha_cli.report import wording
from qwha_cli.report.collect import RunReport
from qwha_cli.report.table import TableRow


def report(*rows: TableRow, **fields: object) -> RunReport:
    empty = RunReport("x", Path("x"), "", {}, (), {}, rows, (), (), (), (), {})
    return dataclasses.replace(empty, **fields)  # type: ignore[arg-type]


def sentences(found: RunReport) -> str:
    return " ".join(wording.wins(found)).replace("\u00a0", " ")


def answers(**values: float) -> RunReport:
    return report(*(TableRow(row=name.replace("bit16", "16-bit"), perplexity_answers=value) for name, value in values.items()))


def test_the_share_of_the_gap_is_measured_in_loss() -> None:
    text = sentences(answers(bit16=4.0, base=64.0, init=32.0, trained=16.0))
    assert "fell from 64.00 (quantized) to 16.00 (after training)" in text
    assert "closes 50 % of the gap in loss to the 16-bit model's 4.00" in text
    assert "Initialisation alone, before any training, gave 32.00." in text


def test_training_that_hurt_is_said_to_have_hurt() -> None:
    text = sentences(answers(bit16=4.0, base=8.0, trained=9.0))
    assert "rose from 8.00 (quantized) to 9.00" in text
    assert "the 16-bit model has 4.00" in text
    assert "%" not in text


def test_beating_the_16_bit_model_is_said_with_its_reason() -> None:
    assert "below the 4.00 of the 16-bit model, which was not fine-tuned on this data" in sentences(
        answers(bit16=4.0, base=8.0, trained=2.0)
    )


def test_before_training_only_what_is_known_is_said() -> None:
    assert sentences(answers(base=8.0)) == "Perplexity on held-out answers is 8.00 after quantization."
    assert "after initialisation" in sentences(answers(bit16=4.0, base=8.0, init=6.0))
    assert sentences(report()) == ""


@pytest.mark.parametrize(
    ("after", "said"), [(0.42, "rose from 10.0 ± 3.0 %"), (0.14, "no difference beyond two standard errors"), (0.0, "fell from")]
)
def test_a_change_within_two_standard_errors_is_no_change(after: float, said: str) -> None:
    base = TableRow(row="base", exact_match=0.10, exact_match_stderr=0.03, n=100)
    trained = TableRow(row="trained", exact_match=after, exact_match_stderr=0.03, n=100)
    assert said in sentences(report(base, trained))


def test_layers_that_got_worse_are_not_counted_as_better() -> None:
    records = ({"error_zero": 0.2, "error_after": 0.1}, {"error_zero": 0.1, "error_after": 0.15}, {"name": "without numbers"})
    assert "from 15.0 % to 12.5 %, measured with the earlier blocks corrected; 1 of 2 layers improved" in sentences(
        report(initialised=records)
    )


def test_size_is_compared_with_16_bits() -> None:
    rows = (TableRow(row="16-bit", megabytes=269.0), TableRow(row="trained", megabytes=62.0, bits_per_weight=3.4))
    assert "62.0 MB instead of 269 MB, 4.3 times less; a quantized weight costs 3.40 bits" in sentences(report(*rows))


def test_a_model_that_did_not_get_smaller_is_not_called_smaller() -> None:
    rows = (TableRow(row="16-bit", megabytes=0.11), TableRow(row="base", megabytes=0.12, bits_per_weight=8.6))
    text = sentences(report(*rows))
    assert "0.12 MB, no less than the 16-bit model's 0.11 MB" in text
    assert "times less" not in text
    assert "adapter" not in text


def test_an_exact_merge_is_called_exact() -> None:
    assert "to the bit over 8 prompts" in sentences(report(check={"max_logit_difference": 0.0, "kl": 0.0, "prompts": 8}))


def test_the_merge_check_is_quoted() -> None:
    text = sentences(report(check={"max_logit_difference": 0.0625, "kl": 3.1e-5, "prompts": 8}))
    assert "at most 0.062 in a logit and by a divergence of 3.1 · 10⁻⁵ nats over 8 prompts" in text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.perplexity(5.123), "5.12"),
        (wording.perplexity(123.45), "123.5"),
        (wording.perplexity(12345.6), "12,346"),
        (wording.perplexity(1e9), "10^9.0"),
        (wording.perplexity(float("inf")), "∞"),
        (wording.perplexity(None), "–"),
        (wording.percent(0.0), "0.0 %"),
        (wording.percent(0.123), "12.3 %"),
        (wording.percent(0.00002), "0.002 %"),
        (wording.with_error(0.5, None), "50.0 %"),
        (wording.duration(0.0113), "11 ms"),
        (wording.duration(9.26), "9.3 s"),
        (wording.megabytes(0.0847), "0.08"),
        (wording.duration(600), "10.0 min"),
        (wording.duration(9000), "2.5 h"),
        (wording.size(999), "999 B"),
        (wording.size(1_234_567), "1.2 MB"),
        (wording.scientific(0.0), "0"),
        (wording.scientific(12345.0), "1.2 · 10⁴"),
    ],
)
def test_numbers_read_well(written: str, expected: str) -> None:
    assert written.replace("\u00a0", " ") == expected
