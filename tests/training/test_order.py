"""Data order, learning rate, restored optimizer state: everything that is a function of the step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qwha_cli.data.flatten import FlatShape
from qwha_cli.data.tokenize import Encoded
from qwha_cli.errors import ArtifactError, UsageError
from qwha_cli.training.batches import Batches, epoch_order, stream_seed
from qwha_cli.training.optim import (
    build_optimizer,
    learning_rate,
    restore_tensors,
    trained_parameters,
    training_tensors,
    warmup_steps,
)

DATA = [Encoded(input_ids=[index, 7], labels=[-100, 7]) for index in range(10)]


def batches(*, rank: int = 0, ranks: int = 1, accumulation: int = 2, batch_size: int = 4) -> Batches:
    return Batches(DATA, batch_size=batch_size, accumulation=accumulation, seed=5, pad_id=0, pack_to=None, rank=rank, ranks=ranks)


def visited(loader: Batches, steps: int) -> list[int]:
    return [int(i) for s in range(steps) for f in loader.step(s).forwards for i in f["input_ids"][:, 0]]


def test_every_epoch_visits_every_example_once_in_another_order() -> None:
    seen = visited(batches(), 5)
    epochs = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_steps_are_full_and_as_many_as_the_epochs_need() -> None:
    assert [batches().total_steps(epochs) for epochs in (0.1, 0.8, 1.0, 2.0, 4.0)] == [1, 1, 2, 3, 5]
    assert all(len(forward["input_ids"]) == 4 for step in range(5) for forward in batches().step(step).forwards)


def test_ranks_share_out_exactly_the_batch_of_one_process() -> None:
    for step in range(4):
        whole = batches().step(step)
        parts = [batches(rank=rank, ranks=2).step(step) for rank in range(2)]
        for number, forward in enumerate(whole.forwards):
            joined = torch.cat([part.forwards[number]["input_ids"] for part in parts])
            assert torch.equal(joined, forward["input_ids"])
        assert {part.tokens for part in parts} == {whole.tokens} == {16}


@pytest.mark.parametrize("pack_to", [None, 6])
def test_flat_forwards_hold_the_sequences_of_padded_ones(pack_to: int | None) -> None:
    how = {"batch_size": 2, "accumulation": 2, "seed": 5, "pad_id": 0, "pack_to": pack_to, "rank": 0, "ranks": 1}
    side_by_side = Batches(DATA, **how).step(1)
    flat = Batches(DATA, **how, flat=FlatShape(longest=2)).step(1)
    assert (flat.answers, flat.tokens) == (side_by_side.answers, side_by_side.tokens)
    for row, padded in zip(flat.forwards, side_by_side.forwards, strict=True):
        assert torch.equal(row["input_ids"], padded["input_ids"].reshape(1, -1)[:, : row["input_ids"].numel()])
        assert row["cu_seq_lens"].tolist() == list(range(0, row["input_ids"].numel() + 1, 2))
    assert sum(len(row["targets"]) for row in flat.forwards) == flat.answers


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UsageError, match="4 sequences cannot be split evenly among 3"):
        batches(ranks=3)


def test_streams_of_neighbouring_places_differ() -> None:
    assert len({stream_seed(s, "step", i, r) for s in range(3) for i in range(20) for r in range(3)}) == 180
    assert torch.equal(epoch_order(10, seed=1, epoch=2), epoch_order(10, seed=1, epoch=2))


def test_rate_rises_to_the_peak_and_falls_as_asked() -> None:
    def rates(schedule: str) -> list[float]:
        return [learning_rate(s, total=10, peak=2.0, schedule=schedule, warmup=0.2) for s in range(10)]  # type: ignore[arg-type]

    assert rates("constant") == [1.0] + [2.0] * 9
    assert rates("linear")[1:] == pytest.approx([2.0, *(2.0 * (1 - k / 8) for k in range(8))])
    assert rates("cosine")[6] == pytest.approx(1.0 + math.cos(math.pi / 2))
    assert rates("cosine")[-1] > 0


def test_warmup_is_a_share_below_one_and_a_count_from_one_on() -> None:
    assert [warmup_steps(w, total=40) for w in (0.0, 0.03, 0.5, 1.0, 7.0, 99.0)] == [0, 2, 20, 1, 7, 40]


def _trained() -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(trained_parameters(model), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_optimizer_state_survives_the_round_trip_exactly() -> None:
    model, optimizer = _trained()
    saved = training_tensors(trained_parameters(model), optimizer)
    assert sorted({key.partition("/")[0] for key in saved}) == ["exp_avg", "exp_avg_sq", "step", "values"]
    fresh = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fresh[0].requires_grad_(False)
    parameters = trained_parameters(fresh)
    other = build_optimizer(parameters, lr=0.1, weight_decay=0.1)
    restore_tensors(saved, parameters, optimizer=other, where="here")
    again = training_tensors(parameters, other)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


def test_a_checkpoint_of_other_shapes_is_refused() -> None:
    model, optimizer = _trained()
    saved = training_tensors(trained_parameters(model), optimizer)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    with pytest.raises(ArtifactError, match=r"differ in name or shape, first 0\.bias"):
        restore_tensors(saved, trained_parameters(other), optimizer=optimizer, where="here")
