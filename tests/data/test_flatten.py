"""Flat batches: what lies end to end comes apart again, and what is scored is what a padded batch scores."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from qwha_cli.data.collate import pack, pad_batch
from qwha_cli.data.flatten import FlatShape, flat_batch
from qwha_cli.data.tokenize import IGNORED, Encoded
from qwha_cli.errors import DataError

PAD = 999


def _encoded(seed: int, *, longest: int) -> list[Encoded]:
    chance = random.Random(seed)
    examples = []
    for _ in range(chance.randint(1, 12)):
        ids = [chance.randrange(256) for _ in range(chance.randint(1, longest))]
        # prompts, answers, and places asked for here and there, the first token included
        share = chance.choice([0.0, 0.3, 1.0])
        examples.append(Encoded(ids, [token if chance.random() < share else IGNORED for token in ids]))
    return examples


def _sequences(batch: dict[str, Tensor]) -> list[list[int]]:
    ends = batch["cu_seq_lens"].tolist()
    return [batch["input_ids"][0, start:end].tolist() for start, end in itertools.pairwise(ends)]


def _scored(batch: dict[str, Tensor]) -> list[tuple[list[int], int]]:
    """Each scored token with all that its prediction sees: from its sequence's begin up to its place."""
    ids, positions = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    pairs = zip(batch["places"].tolist(), batch["targets"].tolist(), strict=True)
    return [(ids[place - positions[place] : place + 1], target) for place, target in pairs if target != IGNORED]


def _scored_padded(encoded: list[Encoded]) -> list[tuple[list[int], int]]:
    batch = pad_batch(encoded, pad_id=PAD)
    rows, places = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
    return [
        (batch["input_ids"][row, : place + 1].tolist(), int(batch["labels"][row, place + 1]))
        for row, place in zip(rows.tolist(), places.tolist(), strict=True)
    ]


def test_the_layout_by_hand() -> None:
    rows = [Encoded([5, 6, 7], [5, IGNORED, 7]), Encoded([8], [8]), Encoded([1, 2], [IGNORED, 2])]
    batch = flat_batch(rows, pad_id=0, shape=FlatShape(longest=3, tokens=11, places=4, sequences=4))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1, 2, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 4, 6, 9, 11, 11, 11, 11]
    assert batch["places"].tolist() == [1, 4, 0, 0]
    assert batch["targets"].tolist() == [7, 2, IGNORED, IGNORED]
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "cu_seq_lens": torch.int32,
        "places": torch.int64,
        "targets": torch.int64,
    }


@pytest.mark.parametrize("seed", range(30))
def test_multiples_of_one_fill_up_nothing(seed: int) -> None:
    encoded = _encoded(seed, longest=20)
    batch = flat_batch(encoded, pad_id=PAD, shape=FlatShape(longest=20))
    assert _sequences(batch) == [one.input_ids for one in encoded]
    assert _scored(batch) == _scored_padded(encoded)
    assert IGNORED not in batch["targets"]


@pytest.mark.parametrize("seed", range(30))
def test_filled_up_sizes_are_multiples_and_change_neither_sequences_nor_targets(seed: int) -> None:
    encoded = _encoded(seed, longest=20)
    chance = random.Random(seed)
    shape = FlatShape(longest=20, tokens=chance.choice([7, 64]), places=chance.randint(1, 9), sequences=chance.randint(1, 9))
    batch = flat_batch(encoded, pad_id=PAD, shape=shape)
    assert batch["input_ids"].shape == batch["position_ids"].shape
    assert batch["input_ids"].shape[1] % shape.tokens == 0
    assert len(batch["places"]) % shape.places == 0
    assert (len(batch["cu_seq_lens"]) - 1) % shape.sequences == 0
    assert batch["cu_seq_lens"][-1] == batch["input_ids"].shape[1]
    found = _sequences(batch)
    assert found[: len(encoded)] == [one.input_ids for one in encoded]
    assert all(token == PAD for sequence in found[len(encoded) :] for token in sequence)
    assert max(map(len, found)) <= shape.longest
    assert batch["position_ids"][0].tolist() == [place for sequence in found for place in range(len(sequence))]
    assert _scored(batch) == _scored_padded(encoded)


@pytest.mark.parametrize("seed", range(10))
def test_packed_rows_come_apart_into_their_examples(seed: int) -> None:
    encoded = _encoded(seed, longest=20)
    batch = flat_batch(pack(encoded, length=30), pad_id=PAD, shape=FlatShape(longest=20))
    assert sorted(_sequences(batch)) == sorted(one.input_ids for one in encoded)
    assert sorted(_scored(batch)) == sorted(_scored_padded(encoded))


def test_a_sequence_longer_than_promised_is_an_error() -> None:
    rows = [Encoded([1], [1]), Encoded([1] * 5, [1] * 5)]
    with pytest.raises(DataError, match="sequence 1 has 5 tokens, and attention was promised at most 4"):
        flat_batch(rows, pad_id=0, shape=FlatShape(longest=4))
