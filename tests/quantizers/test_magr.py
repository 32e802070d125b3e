"""MagR: its projection against the definition, its descent, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import ModelError, NumericsError
from qwha_cli.quant.error import layer_error
from qwha_cli.quantizers.magr import largest_eigenvalue, project_l1, smooth
from support.quantized import correlated_inputs, gaussian, options, run_quantizer


def gram_of(features: int) -> Tensor:
    inputs = correlated_inputs(512, features)
    return inputs.T @ inputs


def objective(weight: Tensor, smoothed: Tensor, gram: Tensor, alpha: float, group_size: int) -> float:
    difference = (weight - smoothed).double()
    fit = ((difference @ gram.double()) * difference).sum() / largest_eigenvalue(gram) / 2
    return float(fit + alpha * smoothed.double().view(-1, group_size).abs().amax(1).sum())


def test_the_projection_is_the_nearest_point_of_the_ball() -> None:
    vectors = torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projected = project_l1(vectors, radius=2.0)
    assert (projected.abs().sum(1) <= 2 + 1e-12).all()
    # soft thresholding by t(v) with the l1 norm met exactly is the minimiser; find t by bisection
    low, high = torch.zeros(50, 1, dtype=torch.float64), vectors.abs().amax(1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        outside = (vectors.abs() - middle).clamp_min(0).sum(1, keepdim=True) > 2
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    torch.testing.assert_close(projected, vectors.sign() * (vectors.abs() - high).clamp_min(0), rtol=0, atol=1e-12)


def test_points_inside_the_ball_stay_and_a_ball_of_radius_zero_is_the_origin() -> None:
    inside = torch.tensor([[0.1, -0.2, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(project_l1(inside, radius=0.61), inside)
    assert torch.equal(project_l1(torch.randn(5, 8), radius=0.0), torch.zeros(5, 8))


def test_the_eigenvalue_is_close_and_above() -> None:
    gram = gram_of(96)
    true = float(torch.linalg.eigvalsh(gram.double())[-1])
    assert true <= largest_eigenvalue(gram) <= 1.06 * true
    assert largest_eigenvalue(torch.zeros(4, 4)) == 0


def test_smoothing_shrinks_the_extremes_and_hardly_moves_the_output() -> None:
    weight, gram = gaussian(64, 96), gram_of(96)
    smoothed = smooth(weight, gram, alpha=1e-3, group_size=32, name="x")
    extremes = [m.view(-1, 32).abs().amax(1).mean() for m in (weight, smoothed)]
    assert extremes[1] < 0.9 * extremes[0]
    assert layer_error(weight, smoothed, gram) < 1e-2


def plain_descent(weight: Tensor, gram: Tensor, *, alpha: float, group_size: int, iterations: int) -> Tensor:
    """The method as published, without momentum."""
    normalised, smoothed = gram / largest_eigenvalue(gram), weight.clone()
    for _ in range(iterations):
        groups = (smoothed - (smoothed - weight) @ normalised).view(-1, group_size)
        smoothed = (groups - project_l1(groups, radius=alpha)).view(weight.shape)
    return smoothed


def test_the_objective_falls_as_far_as_in_the_two_hundred_published_steps() -> None:
    weight, gram = gaussian(64, 96), gram_of(96)
    ours = smooth(weight, gram, alpha=1e-3, group_size=32, name="x")
    published = plain_descent(weight, gram, alpha=1e-3, group_size=32, iterations=200)
    start, reached, bar = (objective(weight, v, gram, 1e-3, 32) for v in (weight, ours, published))
    assert reached <= bar < 0.8 * start


def test_without_strength_or_inputs_nothing_changes() -> None:
    weight = gaussian(8, 32)
    torch.testing.assert_close(smooth(weight, gram_of(32), alpha=0.0, group_size=16, name="x"), weight, rtol=0, atol=1e-7)
    assert torch.equal(smooth(weight, torch.zeros(32, 32), alpha=1e-3, group_size=16, name="x"), weight)


@pytest.mark.parametrize("grid", ["minmax", "search"])
def test_two_bit_gptq_of_weights_with_outliers_gets_better(grid: str) -> None:
    weight, gram = gaussian(128, 96), gram_of(96)
    outliers = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.03
    weight[outliers] *= 6
    plain, helped = (run_quantizer(weight, gram, options("gptq", 2, 32, grid=grid, magr=alpha)) for alpha in (None, 1e-3))
    errors = [layer_error(weight, packed.dequantize(torch.float32), gram) for packed in (plain, helped)]
    assert errors[1] < 0.9 * errors[0]


def test_gptq_measures_its_grid_on_the_smoothed_weights() -> None:
    weight, gram = gaussian(32, 96), gram_of(96)
    by_option = run_quantizer(weight, gram, options("gptq", 2, 32, magr=1e-3))
    by_hand = run_quantizer(smooth(weight, gram, alpha=1e-3, group_size=32, name="x"), gram, options("gptq", 2, 32))
    assert by_option.digest() == by_hand.digest()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_the_layers_name(value: float) -> None:
    gram = gram_of(32)
    gram[2, 2] = value
    with pytest.raises(NumericsError, match=r"layer some\.layer: MagR diverged") as caught:
        smooth(gaussian(4, 32), gram, alpha=1e-3, group_size=16, name="some.layer")
    assert "quantize.magr=null" in str(caught.value.remedy)


def test_a_matrix_that_is_no_gram_matrix_diverges_and_is_refused() -> None:
    gram = -gram_of(32)
    with pytest.raises(NumericsError, match="MagR diverged"):
        smooth(gaussian(4, 32), gram, alpha=1e-3, group_size=16, name="x")


def test_groups_that_do_not_divide_the_inputs_are_refused() -> None:
    with pytest.raises(ModelError, match="48 is no multiple"):
        smooth(gaussian(4, 48), gram_of(48), alpha=1e-3, group_size=32, name="x")
