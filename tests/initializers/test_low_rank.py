"""CLoQ, QERA-approx, LoftQ and LoRA's own start against float64 references: optimal in their norm, never worse than nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwha_cli.catalog import LOW_RANK_INITIALIZERS, load
from qwha_cli.errors import NumericsError
from qwha_cli.initializers import low_rank
from qwha_cli.initializers.budget import InitOptions
from qwha_cli.kernels.low_rank import LowRank

FITTED = [low_rank.cloq, low_rank.qera, low_rank.loftq]
ALL = [*FITTED, low_rank.zero]
SHAPES = [(30, 48), (80, 48), (48, 48)]
Start = Callable[..., LowRank]


def problem(shape: tuple[int, int] = (30, 48), *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A delta whose rows differ in size, and the Gram matrix of correlated inputs with an uneven spectrum; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64, generator=generator)).Q
    inputs = torch.randn(400, shape[1], dtype=torch.float64, generator=generator)
    inputs = inputs * torch.logspace(-1.5, 1, shape[1], dtype=torch.float64) @ mix
    inputs[:, [1, shape[1] // 2]] *= 6
    delta = torch.randn(shape, dtype=torch.float64, generator=generator) * 0.02
    return delta * (torch.rand(shape[0], 1, dtype=torch.float64, generator=generator) + 0.1), inputs.T @ inputs


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def error(delta: Tensor, update: Tensor | None, norm: Tensor) -> float:
    rest = delta if update is None else delta - update.double()
    return float(((rest @ norm) * rest).sum())


def whitened_optimum(delta: Tensor, norm: Tensor, rank: int) -> Tensor:
    """The textbook solution, by the symmetric root and its inverse: SVD_r(D N^½) N^-½."""
    sizes, vectors = torch.linalg.eigh(norm)
    root = vectors * sizes.sqrt() @ vectors.T
    left, values, right = torch.linalg.svd(delta @ root, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] @ (vectors / sizes.sqrt() @ vectors.T)


def norm_of(method: Start, gram: Tensor) -> Tensor:
    """The matrix S Sᵀ whose error a method minimises."""
    if method is low_rank.cloq:
        return damped(gram)
    return torch.diag(gram.diagonal()) if method is low_rank.qera else torch.eye(len(gram), dtype=gram.dtype)


def test_the_catalogue_names_these_methods() -> None:
    assert {name: load(entry) for name, entry in LOW_RANK_INITIALIZERS.items()} == {method.__name__: method for method in ALL}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_product_is_the_closed_form_optimum_of_the_methods_norm(method: Start, shape: tuple[int, int], rank: int) -> None:
    delta, gram = problem(shape)
    found = method(delta, gram, rank=rank, options=InitOptions())
    expected = whitened_optimum(delta, norm_of(method, gram), rank)
    torch.testing.assert_close(found.dense(torch.float64), expected, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_update_of_that_rank_has_a_smaller_output_error_than_cloq(shape: tuple[int, int]) -> None:
    delta, gram = problem(shape)
    norm, rank = damped(gram), 4
    best = error(delta, low_rank.cloq(delta, gram, rank=rank, options=InitOptions()).dense(), norm)
    assert best < 0.9 * error(delta, whitened_optimum(delta, torch.eye(shape[1], dtype=torch.float64), rank), norm), "plain SVD"
    assert best < error(delta, low_rank.qera(delta, gram, rank=rank, options=InitOptions()).dense(), norm)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        b = torch.randn(shape[0], rank, dtype=torch.float64, generator=generator)
        for _ in range(200):  # alternating least squares in the same norm, from a random start
            a = torch.linalg.lstsq(b, delta).solution
            b = delta @ norm @ a.T @ torch.linalg.inv(a @ norm @ a.T)
        assert best <= error(delta, b @ a, norm) * (1 + 1e-6)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_no_output_error_rises_on_the_damped_or_the_plain_gram_matrix(method: Start, shape: tuple[int, int], seed: int) -> None:
    delta, gram = problem(shape, seed=seed)
    for rank in (1, 7):
        update = method(delta.float(), gram.float(), rank=rank, options=InitOptions(seed=seed, damping=5.0)).dense()
        for norm in (gram, damped(gram, 5.0)):
            assert error(delta, update, norm) <= error(delta, None, norm) * (1 + 1e-6)
        if method is low_rank.cloq:
            assert error(delta, update, gram) < error(delta, None, gram)


def test_single_precision_inputs_cost_no_error_that_counts() -> None:
    delta, gram = problem((80, 48))
    single = low_rank.cloq(delta.float(), gram.float(), rank=6, options=InitOptions()).dense()
    double = low_rank.cloq(delta, gram, rank=6, options=InitOptions()).dense()
    assert error(delta, single, damped(gram)) == pytest.approx(error(delta, double, damped(gram)), rel=1e-4)


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_delta_back(method: Start, shape: tuple[int, int]) -> None:
    delta, gram = problem(shape)
    found = method(delta, gram, rank=min(shape), options=InitOptions()).dense(torch.float64)
    torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ALL)
def test_a_rank_has_as_many_numbers_as_the_budget_of_that_rank_in_float32(method: Start) -> None:
    delta, gram = problem((80, 48))
    found = method(delta, gram, rank=3, options=InitOptions())
    assert (found.rank, found.shape, found.num_values) == (3, (80, 48), 3 * (80 + 48))
    assert found.a.dtype == found.b.dtype == torch.float32


@pytest.mark.parametrize("method", FITTED)
def test_both_factors_are_of_one_size_component_by_component(method: Start) -> None:
    delta, gram = problem()
    found = method(delta, gram, rank=5, options=InitOptions())
    sizes = torch.linalg.svdvals(found.dense(torch.float64))[:5]
    torch.testing.assert_close(found.b.double().T @ found.b.double(), torch.diag(sizes), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.a.double() @ found.a.double().T, torch.diag(sizes), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ALL)
def test_the_same_inputs_give_the_same_bits(method: Start) -> None:
    delta, gram = problem()
    one, other = (method(delta.clone(), gram.clone(), rank=5, options=InitOptions(seed=2)) for _ in range(2))
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)


@pytest.mark.parametrize("method", FITTED)
def test_the_sign_of_a_component_is_fixed_by_its_largest_output(method: Start) -> None:
    delta, gram = problem()
    found = method(delta, gram, rank=5, options=InitOptions())
    assert (found.b.gather(0, found.b.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_zero_adds_nothing_and_its_a_is_pefts_default_distribution_by_seed() -> None:
    delta, gram = problem((80, 48))
    found = low_rank.zero(delta, gram, rank=40, options=InitOptions(seed=1))
    assert found.dense().abs().max() == 0
    assert 0.95 / 48**0.5 < float(found.a.abs().max()) <= 1 / 48**0.5
    assert float(found.a.std()) == pytest.approx(1 / (3 * 48) ** 0.5, rel=0.05)
    assert not torch.equal(found.a, low_rank.zero(delta, gram, rank=40, options=InitOptions(seed=2)).a)


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("true_rank", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_components_without_an_error_to_undo_can_still_be_trained(method: Start, true_rank: int, shape: tuple[int, int]) -> None:
    delta, gram = problem(shape)
    left, sizes, right = torch.linalg.svd(delta, full_matrices=False)
    delta = (left[:, :true_rank] * sizes[:true_rank]) @ right[:true_rank]
    found = method(delta, gram, rank=5, options=InitOptions(seed=3))
    torch.testing.assert_close(found.dense(torch.float64), delta, rtol=1e-4, atol=1e-7)
    assert (found.a.norm(dim=1) > 0.01).all(), "B's gradient is a product with A"
    assert (found.b[:, true_rank:] == 0).all()


def test_inputs_that_were_always_zero_leave_a_finite_update() -> None:
    delta, gram = problem()
    for silent in (gram * 0, gram * (torch.arange(48) < 40) * (torch.arange(48) < 40)[:, None]):
        for method in FITTED:
            found = method(delta, silent, rank=5, options=InitOptions())
            assert torch.isfinite(found.dense()).all()
    blind = low_rank.cloq(delta, gram * 0, rank=5, options=InitOptions()).dense()
    torch.testing.assert_close(blind, low_rank.loftq(delta, gram, rank=5, options=InitOptions()).dense(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("rank", [0, 31])
def test_a_rank_that_does_not_fit_is_refused(method: Start, rank: int) -> None:
    delta, gram = problem()
    with pytest.raises(NumericsError, match=f"rank {rank} does not fit a weight of 30 x 48") as caught:
        method(delta, gram, rank=rank, options=InitOptions())
    assert "adapter.rank" in str(caught.value.remedy)


@pytest.mark.parametrize("method", ALL)
def test_numbers_that_are_not_finite_are_refused(method: Start) -> None:
    delta, gram = problem()
    broken = delta.clone()
    broken[3, 4] = torch.nan
    with pytest.raises(NumericsError, match="error is not finite"):
        method(broken, gram, rank=2, options=InitOptions())
    gram[3, 4] = torch.inf
    with pytest.raises(NumericsError, match="Gram matrix is not finite"):
        method(delta, gram, rank=2, options=InitOptions())


def test_a_gram_matrix_that_is_none_is_refused_with_the_key_that_helps() -> None:
    delta, gram = problem()
    with pytest.raises(NumericsError, match="not positive definite") as caught:
        low_rank.cloq(delta, gram - gram.diagonal().mean() * torch.eye(48), rank=2, options=InitOptions(damping=1e-6))
    assert "init.damping" in str(caught.value.remedy)
