"""Places: the form kernels read, its two ways in, and the union of several."""

from __future__ import annotations

import pytest
import torch

from qwha_cli.kernels.places import Places
from support.codes import random_places


@pytest.mark.parametrize(("columns", "kind"), [(48, torch.uint16), (2**16, torch.uint16), (2**16 + 2, torch.int32)])
def test_columns_take_16_bits_where_they_fit_and_come_back_as_they_were(columns: int, kind: torch.dtype) -> None:
    flat = torch.tensor([0, 5, columns - 1, columns + 1, 3 * columns - 1], dtype=torch.int32)
    places = Places.from_flat(flat, shape=(4, columns))
    assert places.columns.dtype == kind
    assert places.row_starts.dtype == torch.int32
    assert places.row_starts.tolist() == [0, 3, 4, 5, 5]
    assert len(places) == 5
    assert torch.equal(places.flat_index, flat)
    assert places.flat_index is places.flat_index
    assert torch.equal(places.with_values(torch.arange(5.0)).columns, flat % columns)


def test_the_flat_index_made_under_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        places = random_places((7, 12))
        assert places.flat_index.numel() == len(places)
    places = random_places((7, 12))
    with torch.inference_mode():
        index = places.flat_index
    assert not index.is_inference()


def test_a_union_has_each_place_once_and_says_whose_entry_is_where() -> None:
    parts = [random_places((7, 12), seed=seed) for seed in range(3)]
    union, entry = Places.union(parts)
    every = torch.cat([part.flat_index for part in parts])
    assert entry.dtype == torch.int32
    assert torch.equal(union.flat_index, every.unique())
    assert torch.equal(union.flat_index[entry.long()], every)
    assert len(union) < sum(map(len, parts))
    values = torch.randn(len(every), dtype=torch.float64)
    together = torch.zeros(len(union), dtype=torch.float64).index_add(0, entry, values)
    expected = sum(part.with_values(own).dense() for part, own in zip(parts, values.split([len(p) for p in parts]), strict=True))
    torch.testing.assert_close(union.with_values(together).dense(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("span", [5, 16, 47, 48, 100])
def test_span_starts_say_which_entries_lie_in_each_piece_of_a_row(span: int) -> None:
    places = random_places((7, 48))
    starts = places.span_starts(span)
    assert starts.dtype == torch.int32
    assert places.span_starts(span) is starts
    spans = -(-48 // span)
    assert starts.numel() == 7 * spans + 1
    rows = places.with_values(places.columns).row_index()
    piece = rows * spans + places.columns.int() // span
    counts = torch.bincount(piece, minlength=7 * spans)
    assert torch.equal(starts.diff(), counts.int())
