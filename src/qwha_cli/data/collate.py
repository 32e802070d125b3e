"""Batches: padding to the longest, or packing several examples into one row without letting them see each other.

Isolation of packed examples comes from position_ids that begin at 0 again with every example: transformers' mask builder reads
the steps backwards and makes attention (full and sliding windows; sdpa, eager and flash) block-diagonal. It does so only when it
gets **no attention_mask and no cache**, so a packed batch has no attention_mask and the model must be called with
`use_cache=False`. A 4-D mask of our own was rejected: it must have the compute dtype, overrides sliding windows and is quadratic.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwha_cli.data.tokenize import IGNORED, Encoded
from qwha_cli.errors import DataError


def pad_batch(encoded: Sequence[Encoded], *, pad_id: int, side: str = "right") -> dict[str, Tensor]:
    """Pad examples to the longest of them.

    Args:
        encoded: At least one example.
        pad_id: Token id to fill with; carries attention 0 and label -100.
        side: "right" for training, "left" for generation.

    Returns:
        int64 tensors (examples, longest): input_ids, attention_mask, labels.
    """
    longest = max(len(one.input_ids) for one in encoded)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for one in encoded:
        gap = longest - len(one.input_ids)
        for name, values, fill in (
            ("input_ids", one.input_ids, pad_id),
            ("attention_mask", [1] * len(one.input_ids), 0),
            ("labels", one.labels, IGNORED),
        ):
            rows[name].append([fill] * gap + values if side == "left" else values + [fill] * gap)
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in rows.items()}


@dataclass(frozen=True)
class PackedRow:
    """Several whole examples one after the other; `lengths` says where each ends."""

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]

    @property
    def num_trained(self) -> int:
        """How many tokens of the row carry loss."""
        return sum(label != IGNORED for label in self.labels)


def pack(encoded: Sequence[Encoded], *, length: int) -> list[PackedRow]:
    """Put examples into as few rows of at most `length` tokens as best-fit decreasing finds; no example is split.

    Deterministic: equal lengths keep their order, and rows come in the order of their first example, so that rows are not
    sorted by length.

    Raises:
        DataError: An example is longer than a row.
    """
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].input_ids))
    members: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending: the first that is large enough fits best
    for index in order:
        need = len(encoded[index].input_ids)
        if need > length:
            raise DataError(
                f"example {index} has {need} tokens and a packed row holds {length}",
                remedy="tokenize with max_length no longer than the row",
            )
        place = bisect_left(room, (need, -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = length, len(members)
            members.append([])
        members[row].append(index)
        insort(room, (free - need, row))
    return [_row([encoded[index] for index in row]) for row in sorted(sorted(row) for row in members)]


def _row(examples: Sequence[Encoded]) -> PackedRow:
    row = PackedRow([], [], [])
    for one in examples:
        row.input_ids.extend(one.input_ids)
        # the first token of an example would be predicted from the last of its neighbour
        row.labels.extend([IGNORED, *one.labels[1:]])
        row.lengths.append(len(one.input_ids))
    return row


def packed_batch(rows: Sequence[PackedRow], *, pad_id: int) -> dict[str, Tensor]:
    """One batch of packed rows, padded on the right to the longest row; call the model with `use_cache=False`.

    Args:
        rows: At least one row of `pack`.
        pad_id: Token id to fill with. Padding is a segment of its own: nothing attends to it and it carries no loss.

    Returns:
        int64 tensors (rows, longest): input_ids, labels, position_ids. There is deliberately no attention_mask.
    """
    longest = max(len(row.input_ids) for row in rows)
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    positions: list[list[int]] = []
    for row in rows:
        gap = longest - len(row.input_ids)
        ids.append(row.input_ids + [pad_id] * gap)
        labels.append(row.labels + [IGNORED] * gap)
        positions.append([position for length in [*row.lengths, gap] for position in range(length)])
    named = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in named.items()}
