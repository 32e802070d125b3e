"""Places as bytes: exact for every matrix, as short as promised, and no damaged byte goes unseen."""

from __future__ import annotations

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
        free = place - cursor
        stream += [255] * (free // 3840)
        if free % 3840 >= 240:
            stream.append(239 + free % 3840 // 240)
        stream.append(free % 240)
        cursor = place + 1
    return stream


def read_by_hand(stream: list[int]) -> list[int]:
    """The program in docs/artifacts.md, without its assertions; the last place is the one behind the matrix."""
    cursor, places = 0, []
    for byte in stream:
        if byte < 240:
            places.append(cursor + byte)
            cursor += byte + 1
        else:
            cursor += (byte - 239) * 240
    return places


SHAPES = [(1, 1), (1, 239), (1, 240), (1, 241), (7, 12), (300, 1), (3, 20000), (1, 32772), (80, 48), (5, 240), (2, 3840)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.04, 0.5, 1.0])
def test_every_pattern_comes_back_exactly_and_is_the_documented_stream(shape: tuple[int, int], density: float) -> None:
    size = shape[0] * shape[1]
    for seed in range(3):
        places = drawn(size, density=density, seed=seed)
        stream = encode_gaps(places, size=size)
        assert stream.dtype == torch.uint8
        assert stream.tolist() == coded_by_hand(places.tolist(), size)
        assert read_by_hand(stream.tolist()) == [*places.tolist(), size]
        decoded = decode_gaps(stream, entries=len(places), size=size)
        assert decoded.dtype == torch.int32
        assert torch.equal(decoded, places)


def test_the_documentations_example_is_its_stream() -> None:
    places = torch.tensor([5, 6, 550], dtype=torch.int32)
    assert encode_gaps(places, size=3 * 200).tolist() == [5, 0, 241, 63, 49]


MULTIPLES = (240, 480, 3600, 3840, 4080, 7680, 32640, 69120)


@pytest.mark.parametrize("free", [0, 1, 255, 65535, *(edge + step for edge in MULTIPLES for step in (-1, 0, 1))])
def test_gaps_around_the_skips_multiples_are_exact_before_between_and_behind_entries(free: int) -> None:
    places = torch.tensor([free, 2 * free + 1, 2 * free + 2], dtype=torch.int32)
    size = 3 * free + 3
    stream = encode_gaps(places, size=size)
    assert len(stream) == 4 + 3 * (free // 3840 + (free % 3840 >= 240))
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


@pytest.mark.parametrize(("density", "bits"), [(0.001, 14.7), (0.01, 8.75), (0.02, 8.1), (0.04, 8.01), (0.15, 8.01)])
def test_entries_strewn_at_random_cost_the_promised_bits(density: float, bits: float) -> None:
    shape = (896, 896)
    places = drawn(shape[0] * shape[1], density=density)
    assert 8 * len(encode_gaps(places, size=shape[0] * shape[1])) / len(places) <= bits


def test_no_pattern_costs_more_than_two_bytes_an_entry_and_the_longest_skips() -> None:
    size = 100_000
    for every in (1, 2, 240, 241, 479, 480, 481, 3840, 3841, 4080, 4081, 5000, size):
        places = torch.arange(every - 1, size, every, dtype=torch.int32)
        assert len(encode_gaps(places, size=size)) <= 2 * (len(places) + 1) + size // 3840


def test_no_damage_of_one_byte_goes_unseen() -> None:
    size = 9000
    places = torch.cat([drawn(600, density=0.1), torch.tensor([900, 1140, 1980, 8900], dtype=torch.int32)])
    stream = encode_gaps(places, size=size)
    assert {240, 242, 255} <= set(stream.tolist())
    for index in range(len(stream)):
        for wrong in set(range(256)) - {int(stream[index])}:
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
        "swapped end": torch.cat([stream[:-2], stream[-1:], stream[-2:-1]]),
    }.get(damage, stream)
    entries, size = {"another size": (2, 999), "another count": (3, 1000)}.get(damage, (2, 1000))
    with pytest.raises(KernelError):
        decode_gaps(changed, entries=entries, size=size)


@pytest.mark.parametrize("places", [[3, 3], [4, 3], [-1, 2], [2, 10]])
def test_places_that_repeat_descend_or_lie_outside_are_refused(places: list[int]) -> None:
    with pytest.raises(KernelError, match=r"ascend within 0 \.\. 9"):
        encode_gaps(torch.tensor(places, dtype=torch.int32), size=10)
