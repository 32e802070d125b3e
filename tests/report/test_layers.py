"""Layers as a grid and in order of their error."""

from __future__ import annotations

import random

import pytest

from qwha_cli.errors import DataError
from qwha_cli.report.layers import common_prefix, finite_number, layer_grid, worst_layers
from support.run_folder import layer_records


def test_a_grid_has_projections_in_their_order_in_a_block_and_every_value_in_its_place() -> None:
    records = layer_records(3)
    shuffled = random.Random(1).sample(records, len(records))
    grid = layer_grid(shuffled, "error_after")
    assert grid.projections == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for record in records:
        assert grid.values[grid.projections.index(str(record["projection"]))][int(str(record["block"]))] == record["error_after"]


def test_what_is_absent_or_no_number_is_none_and_unknown_projections_come_last() -> None:
    records: list[dict[str, object]] = [
        {"block": 0, "projection": "fc_in", "e": 0.5},
        {"block": 1, "projection": "down_proj", "e": 0.0},
        {"block": 1, "projection": "fc_in", "e": float("nan")},
        {"block": 2, "projection": "fc_in"},
    ]
    grid = layer_grid(records, "e")
    assert grid.projections == ("down_proj", "fc_in")
    assert grid.values == ((None, 0.0), (0.5, None))
    assert grid.positive == [0.5]
    with pytest.raises(DataError, match="no layer has a missing"):
        layer_grid(records, "missing")


def test_the_worst_layers_come_first_and_layers_without_a_number_last() -> None:
    records = [{"name": name, "e": error} for name, error in (("a", 0.1), ("b", None), ("c", 0.3), ("d", 0.3), ("e", 0.2))]
    assert [r["name"] for r in worst_layers(records, "e", count=4)] == ["c", "d", "e", "a"]
    assert [r["name"] for r in worst_layers(records, "e", count=9)][-1] == "b"


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["model.layers.0.mlp.up", "model.layers.11.mlp.up"], "model.layers."),
        (["model.layers.1.mlp.up", "model.layers.11.mlp.up"], "model.layers."),
        (["model.layers.0.mlp.up", "model.layers.0.mlp.down"], "model.layers.0.mlp."),
        (["a", "b"], ""),
        ([], ""),
    ],
)
def test_the_common_prefix_ends_with_a_dot(names: list[str], prefix: str) -> None:
    assert common_prefix([{"name": name} for name in names]) == prefix


NUMBERS = [(1, 1.0), (0.5, 0.5), (True, None), (float("inf"), None), ("1", None), (None, None)]


@pytest.mark.parametrize(("value", "number"), NUMBERS)
def test_only_finite_numbers_are_numbers(value: object, number: float | None) -> None:
    assert finite_number(value) == number
