"""Places as bytes: exact for every matrix, as short as promised, and no damaged byte goes unseen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.gaps import decode_gaps, encode_gaps
from qwha_cli.kernels.sparse_matmul import SparseRows


def drawn(size: int, *, density: float, seed: int = 0) -> Tensor:
    """Ascending places strewn at random."""
    return (torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density).nonzero()[:, 0].int()


def coded_by_hand(places: list[int], size: int) -> list[int]:
    """The format as docs/artifacts.md tells it, byte after byte."""
    stream: list[int] = []
    cursor = 0
    for place in [*places, size]:
        while place - cursor >= 255:
            stream.append(255)
            cursor += 255
        stream.append(place - cursor)
        cursor = place + 1
    return stream


SHAPES = [(1, 1), (1, 255), (1, 256), (7, 12), (300, 1), (3, 20000), (1, 32772), (80, 48), (5, 254), (5, 255), (5, 256)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.04, 0.5, 1.0])
def test_every_pattern_comes_back_exactly_and_is_the_documented_stream(shape: tuple[int, int], density: float) -> None:
    size = shape[0] * shape[1]
    for seed in range(3):
        places = drawn(size, density=density, seed=seed)
        stream = encode_gaps(places, size=size)
        assert stream.dtype == torch.uint8
        assert stream.tolist() == coded_by_hand(places.tolist(), size)
        decoded = decode_gaps(stream, entries=len(places), size=size)
        assert decoded.dtype == torch.int32
        assert torch.equal(decoded, places)


def test_the_documentations_example_is_its_stream() -> None:
    places = torch.tensor([5, 6, 550], dtype=torch.int32)
    assert encode_gaps(places, size=3 * 200).tolist() == [5, 0, 255, 255, 33, 49]


@pytest.mark.parametrize("free", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 32767, 32768, 65535, 70000])
def test_gaps_around_the_skips_multiples_are_exact_before_between_and_behind_entries(free: int) -> None:
    places = torch.tensor([free, 2 * free + 1, 2 * free + 2], dtype=torch.int32)
    size = 3 * free + 3
    stream = encode_gaps(places, size=size)
    assert len(stream) == 4 + 3 * (free // 255)
    assert torch.equal(decode_gaps(stream, entries=3, size=size), places)


def test_empty_rows_full_rows_and_lone_ends_come_back_as_the_same_rows() -> None:
    mask = torch.zeros(9, 700, dtype=torch.bool)
    mask[2], mask[4, 0], mask[5, 699], mask[8, 10] = True, True, True, True
    rows = SparseRows.from_mask(torch.randn(mask.shape), mask)
    places = decode_gaps(encode_gaps(rows.flat_index(), size=mask.numel()), entries=len(rows.values), size=mask.numel())
    again = SparseRows.from_flat(places, rows.values, shape=rows.shape)
    assert torch.equal(again.row_starts, rows.row_starts)
    assert torch.equal(again.columns, rows.columns)
    assert again.row_starts.dtype == again.columns.dtype == torch.int32


def test_the_largest_matrix_of_32_bit_places_has_no_overflow() -> None:
    size = 2**31 - 1
    for places in (torch.tensor([], dtype=torch.int32), torch.tensor([size - 1], dtype=torch.int32)):
        stream = encode_gaps(places, size=size)
        assert torch.equal(decode_gaps(stream, entries=len(places), size=size), places)


@pytest.mark.parametrize(
    ("density", "bits"), [(0.01, 8.72), (0.02, 8.08), (0.04, 8.01), (0.15, 8.01)], ids=["1%", "2%", "4%", "15%"]
)
def test_entries_strewn_at_random_cost_about_a_byte_each(density: float, bits: float) -> None:
    shape = (896, 896)
    places = drawn(shape[0] * shape[1], density=density)
    assert 8 * len(encode_gaps(places, size=shape[0] * shape[1])) / len(places) <= bits


def test_no_pattern_costs_more_than_a_byte_an_entry_and_the_skips_of_the_whole_matrix() -> None:
    size = 100_000
    for every in (1, 2, 254, 255, 256, 257, 511, 5000, size):
        places = torch.arange(every - 1, size, every, dtype=torch.int32)
        assert len(encode_gaps(places, size=size)) <= len(places) + 1 + math.floor(size / 255)


def test_no_damage_of_one_byte_goes_unseen() -> None:
    size = 2000
    places = torch.cat([drawn(600, density=0.1), torch.tensor([900, 1153, 1999], dtype=torch.int32)])
    stream = encode_gaps(places, size=size)
    assert (stream == 255).any()
    for index in range(len(stream)):
        for wrong in {0, 1, 128, 253, 254, 255, int(stream[index]) ^ 1} - {int(stream[index])}:
            damaged = stream.clone()
            damaged[index] = wrong
            with pytest.raises(KernelError, match="instead of"):
                decode_gaps(damaged, entries=len(places), size=size)


@pytest.mark.parametrize("damage", ["shorter", "longer", "empty", "swapped end", "another size", "another count"])
def test_a_stream_that_does_not_fit_its_matrix_is_refused(damage: str) -> None:
    places = torch.tensor([3, 400], dtype=torch.int32)
    stream = encode_gaps(places, size=1000)
    changed = {
        "shorter": stream[:-1],
        "longer": torch.cat([stream, stream[-1:]]),
        "empty": stream[:0],
        # as many entries and as far in all, but the walk's last steps are skips
        "swapped end": torch.cat([stream[:-3], stream[-1:], stream[-3:-1]]),
    }.get(damage, stream)
    entries, size = {"another size": (2, 999), "another count": (3, 1000)}.get(damage, (2, 1000))
    with pytest.raises(KernelError):
        decode_gaps(changed, entries=entries, size=size)


@pytest.mark.parametrize("places", [[3, 3], [4, 3], [-1, 2], [2, 10]])
def test_places_that_repeat_descend_or_lie_outside_are_refused(places: list[int]) -> None:
    with pytest.raises(KernelError, match=r"ascend within 0 \.\. 9"):
        encode_gaps(torch.tensor(places, dtype=torch.int32), size=10)
