"""Flat batches: sequences laid end to end in one row, with the places and targets of the loss worked out beforehand.

Nothing is padded to the longest, and a model on a GPU need not be waited for: how long each sequence is stands in `cu_seq_lens`,
where a token is scored in `places`, so neither has to be found out from masks and labels on the device. Attention must keep the
sequences apart by `cu_seq_lens` (`models/varlen.py`). What is filled up is only filled up to multiples, so that few shapes occur
and a recorded CUDA graph fits many batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwha_cli.data.collate import PackedRow
from qwha_cli.data.tokenize import IGNORED, Encoded
from qwha_cli.errors import DataError


@dataclass(frozen=True)
class FlatShape:
    """To what the sizes of flat batches are rounded up; a multiple of 1 fills up nothing.

    Attributes:
        longest: Most tokens of a sequence. Attention is told this bound and not each batch's own longest, because a recorded CUDA
            graph holds the number.
        tokens: Multiple of the number of tokens.
        places: Multiple of the number of scored places.
        sequences: Multiple of the number of sequences, those of padding included.
    """

    longest: int
    tokens: int = 1
    places: int = 1
    sequences: int = 1


def flat_batch(rows: Sequence[Encoded | PackedRow], *, pad_id: int, shape: FlatShape) -> dict[str, Tensor]:
    """Lay sequences end to end in one row of T tokens.

    Padding of the row makes sequences of its own at the end, none longer than `shape.longest`; they carry no loss. The first
    token of a sequence is never scored: it would be predicted from the last of its neighbour.

    Args:
        rows: Examples, or rows of `pack`, whose examples become one sequence each.
        pad_id: Token id to fill up with.
        shape: What T, L and N are multiples of.

    Returns:
        input_ids, position_ids: (1, T) int64; positions begin at 0 with every sequence.
        cu_seq_lens: (N + 1,) int32; sequence n has the tokens from cu_seq_lens[n] to before cu_seq_lens[n + 1]. Filled up with
            empty sequences at the end, unless all are equally long.
        places: (L,) int64, indices into T of the tokens that predict a scored one, ascending. Filled up with 0.
        targets: (L,) int64, the tokens to predict there. Filled up with -100.

    Raises:
        DataError: A sequence is longer than `shape.longest`.
    """
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for row in rows:
        ids.extend(row.input_ids)
        labels.extend(row.labels)
        lengths.extend(row.lengths if isinstance(row, PackedRow) else [len(row.input_ids)])
    _check(lengths, longest=shape.longest)
    gap = -len(ids) % shape.tokens
    lengths.extend(min(shape.longest, gap - start) for start in range(0, gap, shape.longest))
    if len(set(lengths)) > 1:
        lengths.extend([0] * (-len(lengths) % shape.sequences))
    named = _indices(torch.tensor(labels + [IGNORED] * gap, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64))
    fill = -len(named["places"]) % shape.places
    named["places"] = torch.nn.functional.pad(named["places"], (0, fill))
    named["targets"] = torch.nn.functional.pad(named["targets"], (0, fill), value=IGNORED)
    return {"input_ids": torch.tensor([ids + [pad_id] * gap], dtype=torch.int64), **named}


def equal_length(batch: Mapping[str, Tensor]) -> int | None:
    """The length of all sequences of a flat batch on the CPU, if they have the same."""
    starts = batch["cu_seq_lens"]
    found = set(starts.diff().tolist())
    return found.pop() if len(found) == 1 else None


def _check(lengths: Sequence[int], *, longest: int) -> None:
    for index, length in enumerate(lengths):
        if length > longest:
            raise DataError(
                f"sequence {index} has {length} tokens, and attention was promised at most {longest}",
                remedy="tokenize with max_length no longer than that",
            )


def _indices(labels: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Everything but the tokens, from the labels (T,) and the lengths (N,) of the sequences, both int64."""
    ends = lengths.cumsum(0)
    starts = ends - lengths
    # an empty sequence at the end would start behind the row
    labels[starts[lengths > 0]] = IGNORED
    scored = (labels != IGNORED).nonzero().squeeze(1)
    return {
        "position_ids": (torch.arange(len(labels)) - starts.repeat_interleave(lengths)).unsqueeze(0),
        "cu_seq_lens": torch.nn.functional.pad(ends, (1, 0)).to(torch.int32),
        "places": scored - 1,
        "targets": labels[scored],
    }
