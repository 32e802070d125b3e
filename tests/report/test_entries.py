"""Histograms of entries per row: every row in the one bin that holds its count, and bins that add up over layers."""

from __future__ import annotations

import itertools
import random

import pytest

from qwha_cli.report.entries import EntriesHistogram, rows_by_entries, total_rows_by_entries


def test_every_row_is_in_the_bin_that_holds_its_count() -> None:
    for count in (*range(300), 4095, 4096, 4097, 14336, 2**20 - 1):
        found = rows_by_entries([count])
        assert found.counts == (1,)
        assert found.edges[0] <= count < found.edges[1]


def test_edges_are_two_an_octave_and_every_power_of_two_is_one() -> None:
    assert rows_by_entries(range(33)).edges == (0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45)
    assert rows_by_entries(range(33)).counts == (1, 1, 1, 1, 2, 2, 3, 5, 7, 9, 1)
    edges = rows_by_entries(2**octave for octave in range(20)).edges
    assert {2**octave for octave in range(20)} < set(edges)
    assert all(1.3 < high / low < 1.55 for low, high in itertools.pairwise(edges) if low > 1)


def test_empty_bins_between_are_kept_and_those_at_the_ends_are_not() -> None:
    assert rows_by_entries([3, 3, 6]) == EntriesHistogram((3, 4, 6, 8), (2, 0, 1))


@pytest.mark.parametrize(("entries", "edges", "counts"), [([], (), ()), ([0, 0], (0, 1), (2,)), ([7, 8], (6, 8, 11), (1, 1))])
def test_no_rows_empty_rows_and_both_sides_of_an_edge(
    entries: list[int], edges: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    assert rows_by_entries(entries) == EntriesHistogram(edges, counts)


def test_rows_without_an_entry_are_counted_apart() -> None:
    assert rows_by_entries([0, 0, 1]).without_entries == 2
    assert rows_by_entries([1, 2]).without_entries == 0
    assert rows_by_entries([]).without_entries == 0


def test_the_total_over_layers_is_the_histogram_of_all_their_rows() -> None:
    numbers = random.Random(5)
    layers = [[numbers.randint(0, 3000) for _ in range(50)] for _ in range(4)] + [[70_000], []]
    records = [{"entries_histogram": rows_by_entries(layer).to_json()} for layer in layers]
    assert total_rows_by_entries(records) == rows_by_entries([count for layer in layers for count in layer])


def test_records_without_a_histogram_are_left_out() -> None:
    assert total_rows_by_entries([]) is None
    assert total_rows_by_entries([{"name": "made by an earlier version"}, {"entries_histogram": 3}]) is None
    assert total_rows_by_entries([{"name": "x"}, {"entries_histogram": {"edges": [2, 3], "counts": [9]}}]) == EntriesHistogram(
        (2, 3), (9,)
    )
