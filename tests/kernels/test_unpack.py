"""Packing: exact for every width and count, and bit by bit GPTQ's layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.unpack import WIDTHS, num_words, pack, unpack

# round counts, one word or one 3-bit period exactly, one more and one less, and the tests' odd layer sizes
COUNTS = (1, 4, 8, 10, 11, 16, 21, 22, 31, 32, 33, 48, 63, 64, 80, 96, 97, 576)


def random_codes(rows: int, count: int, bits: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", COUNTS)
def test_unpack_undoes_pack_exactly(bits: int, count: int) -> None:
    codes = random_codes(5, count, bits, seed=count)
    packed = pack(codes, bits=bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, -(-count * bits // 32)) == (5, num_words(count, bits=bits))
    assert torch.equal(unpack(packed, bits=bits, count=count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_of_all_ones_fill_the_sign_bit_too(bits: int) -> None:
    packed = pack(torch.full((2, 32), (1 << bits) - 1, dtype=torch.uint8), bits=bits)
    assert torch.equal(packed, torch.full_like(packed, -1))
    assert torch.equal(unpack(packed, bits=bits, count=32), torch.full((2, 32), (1 << bits) - 1, dtype=torch.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [32, 48, 97])
def test_a_row_is_one_little_endian_stream_of_bits(bits: int, count: int) -> None:
    codes = random_codes(3, count, bits, seed=1)
    expected = np.zeros((3, num_words(count, bits=bits)), dtype=np.uint32)
    for row in range(3):
        stream = sum(int(code) << (bits * j) for j, code in enumerate(codes[row]))
        for word in range(expected.shape[1]):
            expected[row, word] = (stream >> (32 * word)) & 0xFFFFFFFF
    assert np.array_equal(pack(codes, bits=bits).numpy().view(np.uint32), expected)


def test_three_bit_words_are_those_written_by_hand() -> None:
    """Two codes straddle words: code 10 gives its low 2 bits to word 0, code 21 its low bit to word 1."""
    words = [0, 0, 0]
    codes = [j % 8 for j in range(32)]
    for j in range(10):
        words[0] |= codes[j] << (3 * j)
    words[0] |= (codes[10] & 0b011) << 30
    words[1] |= codes[10] >> 2
    for j in range(11, 21):
        words[1] |= codes[j] << (3 * (j - 11) + 1)
    words[1] |= (codes[21] & 0b001) << 31
    words[2] |= codes[21] >> 1
    for j in range(22, 32):
        words[2] |= codes[j] << (3 * (j - 22) + 2)
    packed = pack(torch.tensor([codes], dtype=torch.uint8), bits=3).numpy().view(np.uint32)
    assert packed.tolist() == [words]
    # the same numbers as literals, in case the recipe above and the code share a misunderstanding
    assert [f"{word:08x}" for word in words] == ["88fac688", "c688fac6", "fac688fa"]


@pytest.mark.parametrize(
    ("bits", "codes", "word"),
    [(2, list(range(4)) * 4, 0xE4E4E4E4), (4, list(range(8)), 0x76543210), (8, [1, 2, 3, 255], 0xFF030201)],
)
def test_round_widths_put_the_first_code_into_the_lowest_bits(bits: int, codes: list[int], word: int) -> None:
    packed = pack(torch.tensor([codes], dtype=torch.uint8), bits=bits)
    assert packed.numpy().view(np.uint32).tolist() == [[word]]


@pytest.mark.parametrize(("count", "bits"), [(80, 3), (16, 2), (8, 4), (4, 8)])
def test_transposed_and_strided_words_unpack_like_contiguous_ones(count: int, bits: int) -> None:
    codes = random_codes(6, count, bits)
    packed = pack(codes, bits=bits)
    assert torch.equal(unpack(packed.T.contiguous().T, bits=bits, count=count), codes)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(KernelError, match=f"no packing of {bits}-bit codes"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits=bits)


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelError, match="code 4 does not fit into 2 bits"):
        pack(torch.tensor([[0, 4]], dtype=torch.uint8), bits=2)


def test_a_number_of_words_that_does_not_fit_the_count_is_refused() -> None:
    packed = pack(random_codes(2, 32, 3), bits=3)
    with pytest.raises(KernelError, match=r"5\) for 48 codes of 3 bits"):
        unpack(packed, bits=3, count=48)
