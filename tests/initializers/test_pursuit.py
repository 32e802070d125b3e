"""Pursuit: gains and losses are what they say, exchanging only helps, and what is chosen beats the paper's choice."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from qwha_cli.initializers import adaalloc, pursuit
from qwha_cli.initializers.budget import InitOptions
from qwha_cli.initializers.refine import refine, row_errors
from qwha_cli.initializers.row_fit import RowFit
from qwha_cli.kernels.sparse_matmul import SparseRows
from support.residual import residual_error

F64 = {"dtype": "float64"}


def problem(out_features: int, in_features: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A delta with heavy tails and rows of different size, and a Gram matrix with an uneven spectrum: float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, dtype=torch.float64, generator=generator)
    inputs = torch.randn(4 * in_features, in_features, dtype=torch.float64, generator=generator)
    inputs = inputs * torch.logspace(-1, 1, in_features, dtype=torch.float64) @ torch.linalg.qr(mix).Q
    delta = torch.randn(out_features, in_features, dtype=torch.float64, generator=generator) ** 3
    return delta * (torch.rand(out_features, 1, dtype=torch.float64, generator=generator) + 0.05), inputs.T @ inputs


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def test_a_loss_is_what_the_row_loses_without_the_entry() -> None:
    delta, gram = problem(5, 24)
    rows = pursuit.initialize(delta, gram, budget=40, options=InitOptions(**F64))
    values, losses = RowFit(delta, gram, damping=0.1, dtype=torch.float64).fit(rows, with_losses=True)
    assert losses is not None
    gram = damped(gram, 0.1)
    before = row_errors(delta, rows.with_values(values.double()), gram)
    for entry, row in enumerate(rows.row_index().tolist()):
        mask = rows.dense() != 0
        mask[row, rows.columns[entry]] = False
        without = refine(delta, gram, SparseRows.from_mask(delta, mask), damping=0.0, dtype=torch.float64)
        lost = row_errors(delta, without, gram)[row] - before[row]
        assert float(losses[entry]) == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (33, 96)])
@pytest.mark.parametrize("density", [0.03, 0.1])
def test_the_chosen_places_leave_less_error_than_the_papers(shape: tuple[int, int], density: float) -> None:
    delta, gram = problem(*shape)
    entries = max(2 * shape[0], int(density * delta.numel()))
    papers = adaalloc.initialize(delta, gram, budget=entries, options=InitOptions(damping=0.1, **F64))
    ours = pursuit.initialize(delta, gram, budget=entries, options=InitOptions(**F64))
    assert residual_error(delta, ours, gram) < 0.9 * residual_error(delta, papers, gram)


def test_exchanges_and_stages_only_lower_the_error() -> None:
    delta, gram = problem(48, 96)
    target = damped(gram, 0.1)
    errors = [
        residual_error(
            delta, pursuit.initialize(delta, gram, budget=460, options=InitOptions(stages=s, exchanges=e, **F64)), target
        )
        for s, e in ((1, 0), (8, 0), (8, 1), (8, 8))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[1]


def test_two_entries_a_row_are_nearly_the_best_two_there_are() -> None:
    delta, _ = problem(6, 10)
    inputs = torch.randn(30, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    target = damped(inputs.T @ inputs, 0.1)
    gram = inputs.T @ inputs
    rows = pursuit.initialize(delta, gram, budget=12, options=InitOptions(exchanges=20, tolerance=0.0, **F64))
    found, best = residual_error(delta, rows, target), 0.0
    for row in range(6):
        errors = []
        for pair in combinations(range(10), 2):
            mask = torch.zeros(1, 10, dtype=torch.bool)
            mask[0, list(pair)] = True
            own = refine(
                delta[row : row + 1], target, SparseRows.from_mask(delta[row : row + 1], mask), damping=0.0, dtype=torch.float64
            )
            errors.append(residual_error(delta[row : row + 1], own, target))
        best += min(errors)
    assert found <= 1.2 * best


def test_an_exactly_sparse_delta_is_found_and_reproduced() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(256, 64, dtype=torch.float64, generator=generator)
    gram = inputs.T @ inputs
    mask = torch.rand(20, 64, generator=generator) < 0.08
    mask[:, :2] = True  # every row gets two in any case
    delta = torch.where(mask, torch.randn(20, 64, dtype=torch.float64, generator=generator).sign() * 2, 0.0)
    rows = pursuit.initialize(
        delta, gram, budget=int(mask.sum()), options=InitOptions(damping=1e-9, stages=16, exchanges=20, **F64)
    )
    assert residual_error(delta, rows, gram) < 1e-6 * residual_error(delta, None, gram)


def test_entries_go_to_the_rows_where_they_gain_most() -> None:
    delta, gram = problem(30, 60)
    delta[7] *= 30
    counts = pursuit.initialize(delta, gram, budget=150, options=InitOptions(**F64)).counts()
    assert int(counts.min()) == 2
    assert int(counts[7]) > 0.3 * 60


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_same_problem_gives_the_same_places(dtype: str) -> None:
    delta, gram = problem(40, 80)
    delta[3] = delta[5]  # equal rows tie in every gain
    one, other = (pursuit.initialize(delta, gram, budget=300, options=InitOptions(dtype=dtype)) for _ in range(2))
    assert torch.equal(one.flat_index(), other.flat_index())
    assert torch.equal(one.values, other.values)


def test_without_any_activation_the_largest_entries_are_taken() -> None:
    delta, _ = problem(6, 20)
    rows = pursuit.initialize(
        delta, torch.zeros(20, 20, dtype=torch.float64), budget=30, options=InitOptions(min_per_row=0, **F64)
    )
    assert torch.equal(rows.dense() != 0, delta.abs() >= delta.abs().flatten().sort(descending=True).values[29])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_and_cpu_choose_the_same_places_in_float64() -> None:
    delta, gram = problem(48, 96)
    here = pursuit.initialize(delta, gram, budget=460, options=InitOptions(**F64))
    there = pursuit.initialize(delta.cuda(), gram.cuda(), budget=460, options=InitOptions(**F64)).to("cpu")
    assert torch.equal(here.flat_index(), there.flat_index())
    torch.testing.assert_close(here.values, there.values)


def test_values_are_the_same_with_and_without_losses_and_padding() -> None:
    delta, gram = problem(7, 24)
    mask = torch.zeros(7, 24, dtype=torch.bool)
    for row, count in enumerate((0, 1, 24, 5, 2, 0, 11)):
        mask[row, :count] = True
    rows = SparseRows.from_mask(delta, mask)
    row_fit = RowFit(delta, gram, damping=0.1, dtype=torch.float64)
    values, nothing = row_fit.fit(rows)
    same, losses = row_fit.fit(rows, with_losses=True)
    assert nothing is None
    assert losses is not None
    assert losses.shape == values.shape
    assert torch.allclose(values, same, rtol=1e-5)
    ridged = damped(gram, 0.1)
    for row in range(7):
        at = mask[row].nonzero()[:, 0]
        exact = torch.linalg.solve(ridged[at][:, at], (delta[row] @ ridged)[at])
        assert torch.allclose(rows.with_values(values.double()).dense()[row, at], exact, rtol=1e-5)


@pytest.mark.parametrize("budget", [2 * 9, 9 * 20 - 9, 9 * 20 - 1, 9 * 20])
def test_the_budget_is_exact_even_where_hardly_a_place_is_free(budget: int) -> None:
    delta, gram = problem(9, 20)
    rows = pursuit.initialize(delta, gram, budget=budget, options=InitOptions(**F64))
    assert rows.columns.numel() == budget
    assert int(rows.counts().min()) >= 2
    assert len(set(rows.flat_index().tolist())) == budget
