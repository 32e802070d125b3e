"""Sharing the budget among rows and marking the places."""

from __future__ import annotations

import pytest
import torch

from qwha_cli.errors import NumericsError
from qwha_cli.initializers.budget import InitOptions, allocate, select
from qwha_cli.kernels import chunks as chunks_module
from qwha_cli.kernels.chunks import chunks


@pytest.mark.parametrize("budget", [20, 21, 57, 100, 101, 399, 400])
@pytest.mark.parametrize("seed", range(3))
def test_the_budget_is_met_exactly_within_the_limits(budget: int, seed: int) -> None:
    weights = torch.rand(10, generator=torch.Generator().manual_seed(seed)) ** 6
    counts = allocate(weights, budget, minimum=2, maximum=40)
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == budget
    assert int(counts.min()) >= 2
    assert int(counts.max()) <= 40


def test_far_from_the_limits_shares_are_proportional_to_one_entry() -> None:
    weights = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    counts = allocate(weights, 5000, minimum=2, maximum=1000)
    assert ((counts - 5000 * weights / weights.sum()).abs() < 1).all()


def test_whole_shares_are_kept_and_remainders_go_to_the_largest() -> None:
    assert allocate(torch.tensor([1.0, 2.0, 3.0]), 60, minimum=0, maximum=60).tolist() == [10, 20, 30]
    # quotas 2.5, 3.75, 3.75
    assert allocate(torch.tensor([2.0, 3.0, 3.0]), 10, minimum=0, maximum=10).tolist() == [2, 4, 4]
    # quotas 10/3 each: the one left over goes to the lowest row
    assert allocate(torch.ones(3), 10, minimum=2, maximum=10).tolist() == [4, 3, 3]


def test_what_a_full_row_cannot_hold_is_shared_in_proportion() -> None:
    # row 0 would get 90 of 120; the 100 beyond its 20 go 1 : 2 : 2 to the others
    assert allocate(torch.tensor([15.0, 1.0, 2.0, 2.0]), 120, minimum=2, maximum=60).tolist() == [60, 12, 24, 24]
    assert allocate(torch.tensor([95.0, 1.0, 2.0, 2.0]), 120, minimum=2, maximum=20 * 3).tolist() == [60, 12, 24, 24]


def test_rows_without_error_get_the_minimum_until_the_others_are_full() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0])
    assert allocate(weights, 14, minimum=2, maximum=10).tolist() == [2, 10, 2]
    assert allocate(weights, 20, minimum=2, maximum=10).tolist() == [5, 10, 5]
    assert allocate(torch.zeros(3), 9, minimum=2, maximum=10).tolist() == [3, 3, 3]


def test_heavier_rows_never_get_fewer() -> None:
    weights = torch.rand(200, generator=torch.Generator().manual_seed(4)).sort().values
    counts = allocate(weights, 3001, minimum=2, maximum=64)
    assert (counts.diff() >= 0).all()


def test_a_row_shorter_than_the_minimum_is_filled() -> None:
    assert allocate(torch.ones(4), 4, minimum=2, maximum=1).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("budget", "remedy"), [(19, "raise adapter.rank"), (401, "lower adapter.rank")])
def test_a_budget_that_cannot_be_is_refused_with_its_remedy(budget: int, remedy: str) -> None:
    with pytest.raises(NumericsError, match=f"budget of {budget} entries does not fit 10 rows of 2 to 40") as caught:
        allocate(torch.ones(10), budget, minimum=2, maximum=40)
    assert remedy in str(caught.value.remedy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_weights_that_are_no_errors_are_refused(bad: float) -> None:
    with pytest.raises(NumericsError, match="not all finite"):
        allocate(torch.tensor([1.0, bad]), 5, minimum=1, maximum=4)


def test_the_highest_scores_are_marked_and_ties_go_to_the_lower_column() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [4.0, 1.0, 2.0, 3.0]])
    mask = select(scores, torch.tensor([2, 3, 0]))
    assert mask.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_selection_in_chunks_is_selection_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(37, 20, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(37) % 21
    whole = select(scores, counts)
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 16 * 20 * 5)
    assert len(list(chunks(37, 16 * 20))) == 8
    assert torch.equal(select(scores, counts), whole)
    assert torch.equal(whole.sum(dim=1), counts)


def test_a_row_larger_than_the_bound_is_still_worked_on() -> None:
    assert list(chunks(2, 2**40)) == [slice(0, 1), slice(1, 2)]


def test_options_are_the_papers_by_default() -> None:
    options = InitOptions()
    assert (options.temperature, options.damping_or(1e-4), options.min_per_row) == (1.0, 1e-4, 2)
    assert options.torch_dtype == torch.float32
    assert InitOptions(dtype="float64").torch_dtype == torch.float64
