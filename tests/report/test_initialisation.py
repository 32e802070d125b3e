"""What is said of an initialisation: the verdict at its levels, totals with and without rivals, and the same numbers as JSON."""

from __future__ import annotations

import json

import pytest

from qwha_cli.report.initialisation import (
    GOOD_MEAN,
    LOST_ERROR,
    WORTH_MEAN,
    Initialisation,
    error_text,
    initialisation,
    recovered,
    verdict,
)
from support.run_folder import layer_records


def layers(*pairs: tuple[float, float], **fields: object) -> list[dict[str, object]]:
    """Return records with errors before and after."""
    return [
        {
            "name": f"model.layers.{i}.up_proj",
            "block": i,
            "projection": "up_proj",
            "error_zero": zero,
            "error_after": after,
            **fields,
        }
        for i, (zero, after) in enumerate(pairs)
    ]


def found(records: list[dict[str, object]], method: str = "pursuit") -> Initialisation:
    value = initialisation(records, method=method)
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("mean", "level"),
    [(0.0, "good"), (GOOD_MEAN, "good"), (GOOD_MEAN * 1.001, "worth"), (WORTH_MEAN, "worth"), (WORTH_MEAN * 1.001, "hardly")],
)
def test_the_verdict_follows_the_mean_error_up_to_and_with_each_level(mean: float, level: str) -> None:
    assert verdict([mean], form=error_text).level == level


def test_more_lost_layers_than_one_in_twenty_cost_one_level() -> None:
    good, lost = [0.001] * 95, [LOST_ERROR * 1.01] * 5
    assert verdict(good + lost, form=error_text).level == "good"
    assert "from 5 of 100 layers that are off by more than 0.2000" in verdict(good + lost, form=error_text).reason
    assert verdict([*good, *lost, 0.21], form=error_text).level == "worth"
    assert verdict([0.03] * 10 + [0.21], form=error_text).level == "hardly"
    assert verdict([0.9] * 10, form=error_text).level == "hardly"


def test_a_verdict_says_its_reason_and_that_it_is_a_prediction() -> None:
    said = verdict([0.0118], form=error_text).sentence
    assert said == "a good start. Predicted from the mean layer error 0.0118 (up to 0.0200 is small); evaluation decides."
    assert "above 0.0200 and up to 0.0600 is middling" in verdict([0.04], form=error_text).reason
    assert "expect to lose some against 16 bits" in verdict([0.04], form=error_text).said
    poor = verdict([0.1], form=error_text)
    assert "above 0.0600 is large" in poor.reason
    assert "more bits, smaller groups, a larger rank or more calibration text first" in poor.said


def test_totals_without_rivals_compare_with_zero_only() -> None:
    line = found(layers((0.02, 0.0138), (0.014, 0.0098))).totals()
    assert line == "mean layer error 0.0170 (zero) → 0.0118 (pursuit), 31 % recovered"


def test_rivals_are_named_as_papers_name_them_and_zero_is_not_told_twice() -> None:
    value = found(layers((0.017, 0.0118), compare={"zero": 0.017, "cloq": 0.0146, "other": 0.02}), method="adaalloc")
    assert value.totals() == (
        "mean layer error 0.0170 (zero) → 0.0118 (AdaAlloc), 31 % recovered; "
        "CLoQ at the same bytes 0.0146; other at the same bytes 0.0200"
    )


def test_a_rival_measured_on_some_layers_is_compared_on_those_alone() -> None:
    records = layers((0.04, 0.03), (0.04, 0.01))
    records[1]["compare"] = {"cloq": 0.02}
    records[0]["compare"] = {"cloq": None}
    value = found(records)
    assert [(r.name, r.layers, r.mean, r.own_mean) for r in value.rivals] == [("cloq", 1, 0.02, 0.01)]
    assert value.totals().endswith("; CLoQ 0.0200 against 0.0100, on 1 layers only")


def test_layers_that_got_worse_are_told_and_rounding_is_not() -> None:
    value = found(layers((0.1, 0.1 * (1 + 1e-9)), (0.1, 0.2), (0.1, 0.05)))
    assert value.worse == 1
    assert "1 of 3 layers worse than with zero" in value.totals()


def test_an_error_of_zero_has_nothing_to_recover() -> None:
    assert found(layers((0.0, 0.0))).totals() == "mean layer error 0.0000 (zero) → 0.0000 (pursuit), 0 % recovered"
    assert recovered(0.0, 0.0) is None
    assert recovered(0.2, None) is None
    assert recovered(0.2, 0.05) == pytest.approx(0.75)


def test_small_errors_do_not_read_as_none() -> None:
    assert [error_text(e) for e in (0.0, 0.00042, 0.001, 0.25)] == ["0.0000", "0.00042", "0.0010", "0.2500"]


def test_records_without_errors_are_left_out_and_none_left_is_none() -> None:
    assert initialisation([], method="pursuit") is None
    assert initialisation([{"name": "a"}, {"error_zero": 0.1, "error_after": float("nan")}], method="pursuit") is None
    assert len(found([*layers((0.1, 0.05)), {"name": "a"}]).records) == 1


def test_json_carries_totals_verdict_worst_layers_heat_map_and_histogram() -> None:
    value = found([r | {"compare": {"cloq": 0.02}} for r in layer_records(4)])
    told = json.loads(json.dumps(value.to_json()))
    assert told["method"] == "pursuit"
    assert told["layers"] == 28
    assert told["layer_error_mean"] == value.mean
    assert told["compare"] == {"cloq": {"layer_error_mean": pytest.approx(0.02), "own_mean": value.mean, "layers": 28}}
    assert told["verdict"] == {"level": value.verdict().level, "sentence": value.verdict().sentence}
    errors = [layer["error_after"] for layer in told["worst_layers"]]
    assert len(errors) == 10
    assert errors == sorted(errors, reverse=True)
    assert [len(row) for row in told["heat_map"]["error_after"]] == [4] * 7
    assert sum(told["entries_histogram"]["counts"]) == 28 * 576
