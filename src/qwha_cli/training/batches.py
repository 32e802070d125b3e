"""Which examples each optimizer step reads: a pure function of (seed, step), the same for any number of ranks.

Epoch e visits the examples in `randperm` order seeded by (seed, e). The epochs are strung together, and step s takes the s-th
slice of `batch_size * accumulation` places of that string. So every step is full: what is left at the end of an epoch is topped
up with the first examples of the next one, nothing is dropped, and there is no loader state that a resumed run would have to
restore. Within a step, forward a takes the a-th `batch_size` places and rank r its r-th equal part of those.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwha_cli.data.collate import IGNORED, PackedRow, pack, packed_batch, pad_batch
from qwha_cli.data.flatten import FlatShape, flat_batch
from qwha_cli.data.tokenize import Encoded
from qwha_cli.errors import UsageError


@dataclass(frozen=True)
class StepBatches:
    """One rank's part of an optimizer step.

    Attributes:
        forwards: One dict of CPU tensors (`input_ids`, `labels`, ...) a forward pass.
        answers: Tokens that carry loss, in the whole step: every rank knows the order, so none has to be asked.
        tokens: Tokens in the whole step, padding not counted.
    """

    forwards: list[dict[str, Tensor]]
    answers: int
    tokens: int


class Batches:
    """The training examples in their order.

    Args:
        encoded: The examples; each must have at least one trained token.
        batch_size: Sequences a forward, over all ranks.
        accumulation: Forwards an optimizer step.
        seed: Of the order.
        pad_id: Token to fill up rows with.
        pack_to: Pack several examples into rows of so many tokens; None pads one example a row.
        rank: This process, of `ranks`.
        ranks: Processes in all.
        flat: Lay the sequences of a forward end to end in one row of such a size, instead of side by side.

    Raises:
        UsageError: `batch_size` does not divide evenly among the ranks.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        pad_id: int,
        pack_to: int | None,
        rank: int,
        ranks: int,
        flat: FlatShape | None = None,
    ) -> None:
        check_split(batch_size, ranks=ranks)
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.pad_id = pad_id
        self.rank = rank
        self.ranks = ranks
        self.flat = flat
        self.rows: list[Encoded] | list[PackedRow] = list(encoded) if pack_to is None else pack(list(encoded), length=pack_to)

    def total_steps(self, epochs: float) -> int:
        """Optimizer steps that `epochs` passes take; the last one is full like every other."""
        return max(1, math.ceil(epochs * len(self.rows) / (self.batch_size * self.accumulation) - 1e-9))

    def mean_tokens(self) -> float:
        """Tokens of a forward on this rank, on average, padding not counted."""
        return sum(len(row.input_ids) for row in self.rows) / len(self.rows) * self.batch_size / self.ranks

    def step(self, index: int) -> StepBatches:
        """Collate this rank's part of the step of `index` (from 0)."""
        share = self.batch_size // self.ranks
        size = self.batch_size * self.accumulation
        rows = [self._row_at(place) for place in range(index * size, (index + 1) * size)]
        starts = range(self.rank * share, size, self.batch_size)
        return StepBatches(
            forwards=[self._collate(rows[start : start + share]) for start in starts],
            # the first place of a row has no prediction
            answers=sum(len(row.labels) - 1 - row.labels[1:].count(IGNORED) for row in rows),
            tokens=sum(len(row.input_ids) for row in rows),
        )

    def _row_at(self, place: int) -> Encoded | PackedRow:
        epoch, offset = divmod(place, len(self.rows))
        return self.rows[int(epoch_order(len(self.rows), seed=self.seed, epoch=epoch)[offset])]

    def _collate(self, rows: Sequence[Encoded | PackedRow]) -> dict[str, Tensor]:
        if self.flat is not None:
            return flat_batch(rows, pad_id=self.pad_id, shape=self.flat)
        packed = [row for row in rows if isinstance(row, PackedRow)]
        if packed:
            return packed_batch(packed, pad_id=self.pad_id)
        return pad_batch([row for row in rows if isinstance(row, Encoded)], pad_id=self.pad_id)


def check_split(batch_size: int, *, ranks: int) -> None:
    """Refuse a batch that does not divide evenly: every rank's mean would weigh its examples differently.

    Raises:
        UsageError: It does not.
    """
    if batch_size % ranks:
        raise UsageError(
            f"a batch of {batch_size} sequences cannot be split evenly among {ranks} processes",
            where="train.batch_size",
            remedy=f"set train.batch_size to a multiple of {ranks}, or start another number of processes",
        )


@functools.lru_cache(maxsize=4)
def epoch_order(size: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits `size` examples: a permutation (size,) int64. Do not write into it."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "order", epoch))
    return torch.randperm(size, generator=generator)


def stream_seed(seed: int, *place: int | str) -> int:
    """A seed for one random stream of the run, unrelated to those of other places even for neighbouring numbers."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
