"""Grids: what is stored is what was optimised, and searching never makes the searched measure worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import ModelError, NumericsError
from qwha_cli.quant.gram import Gram
from qwha_cli.quantizers.grid import Grid, find_grid
from support.quantized import gaussian, options

BITS = (2, 3, 4, 8)


def values_of(grid: Grid, weight: Tensor) -> Tensor:
    return grid.values(grid.codes(weight))


def cost(grid: Grid, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Σ importance |error|^2.4 of each group, as the search defines it."""
    error = (values_of(grid, weight) - weight).abs() ** 2.4
    error = error if importance is None else error * importance
    return error.view(*grid.scales.shape, -1).sum(-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("grid", ["minmax", "search"])
@pytest.mark.parametrize("bits", BITS)
def test_every_weight_gets_the_nearest_of_the_stored_values(bits: int, grid: str, symmetric: bool) -> None:
    weight = gaussian(12, 48)
    found = find_grid(weight, options=options("rtn", bits, 16, grid=grid, symmetric=symmetric), name="x")
    levels = torch.arange(1 << bits).float()
    zeros, scales = found.zeros.float(), found.scales.float()
    table = ((levels - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).repeat_interleave(16, dim=1)  # (out, in, levels)
    best = (table - weight.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((values_of(found, weight) - weight).abs(), best, rtol=0, atol=1e-7)
    assert found.scales.dtype == torch.float16
    assert (found.scales > 0).all()
    assert int(found.zeros.max()) < 1 << bits


@pytest.mark.parametrize("bits", BITS)
def test_minmax_spans_the_extremes_of_each_group(bits: int) -> None:
    weight = gaussian(12, 48)
    found = find_grid(weight, options=options("rtn", bits, 16, grid="minmax"), name="x")
    error = (values_of(found, weight) - weight).abs().view(12, 3, 16)
    # half a step from rounding; another half at one end because the zero point is an integer
    assert (error <= 1.01 * found.scales.float().unsqueeze(-1)).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_grid_has_its_zero_in_the_middle(bits: int) -> None:
    found = find_grid(gaussian(12, 48), options=options("rtn", bits, 16, symmetric=True), name="x")
    assert (found.zeros == 1 << (bits - 1)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_search_is_never_worse_than_minmax_in_any_group(bits: int, symmetric: bool) -> None:
    weight = gaussian(64, 96)
    weight[:, 5] *= 6  # an outlier in a group is what shrinking is for
    for importance in (None, torch.rand(96, generator=torch.Generator().manual_seed(0))):
        minmax = find_grid(weight, options=options("rtn", bits, 32, grid="minmax", symmetric=symmetric), name="x")
        search = find_grid(weight, options=options("rtn", bits, 32, symmetric=symmetric), name="x", importance=importance)
        before, after = cost(minmax, weight, importance), cost(search, weight, importance)
        assert (after <= before * (1 + 1e-4) + 1e-12).all()
        if bits == 2:
            assert after.sum() < 0.8 * before.sum()


def test_search_moves_the_zero_point_where_that_is_better() -> None:
    weight = gaussian(64, 96)
    minmax = find_grid(weight, options=options("rtn", 2, 32, grid="minmax"), name="x")
    search = find_grid(weight, options=options("rtn", 2, 32), name="x")
    moved = search.zeros != minmax.zeros
    assert moved.float().mean() > 0.05
    unmoved = Grid(search.scales, minmax.zeros, 2, 2, 32)
    assert (cost(search, weight)[moved] < cost(unmoved, weight)[moved]).all()


def test_important_inputs_get_the_smaller_error() -> None:
    weight = gaussian(64, 64)
    importance = torch.ones(64)
    importance[::4] = 100
    plain = find_grid(weight, options=options("rtn", 2, 64), name="x")
    weighted = find_grid(weight, options=options("rtn", 2, 64), name="x", importance=importance)
    error = lambda grid: ((values_of(grid, weight) - weight)[:, ::4] ** 2).sum()  # noqa: E731
    assert error(weighted) < 0.9 * error(plain)


def test_a_rows_grid_does_not_depend_on_the_other_rows() -> None:
    weight = gaussian(600, 512)  # more rows than the search takes at a time
    whole = find_grid(weight, options=options("rtn", 2, 64), name="x")
    part = find_grid(weight[337:341], options=options("rtn", 2, 64), name="x")
    assert torch.equal(whole.scales[337:341], part.scales)
    assert torch.equal(whole.zeros[337:341], part.zeros)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("grid", ["minmax", "search"])
@pytest.mark.parametrize("bits", BITS)
def test_degenerate_groups_stay_finite(bits: int, grid: str, symmetric: bool) -> None:
    weight = gaussian(6, 48)
    weight[0] = 0
    weight[1] = 0.3
    weight[2] = -0.3
    weight[3, 7] = 100
    weight[4] *= 1e-7
    found = find_grid(weight, options=options("rtn", bits, 16, grid=grid, symmetric=symmetric), name="x")
    values = values_of(found, weight)
    assert torch.isfinite(values).all()
    assert torch.equal(values[0], torch.zeros(48)), "zeros must stay zeros: pruned weights would come back"
    if not symmetric:
        torch.testing.assert_close(values[1:3], weight[1:3], rtol=1e-3, atol=0)
    assert (values[4].abs() <= 1e-6).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e7])
def test_weights_that_no_scale_can_hold_are_refused_by_the_layers_name(bad: float) -> None:
    weight = gaussian(4, 16)
    weight[2, 3] = bad
    for grid in ("minmax", "search"):
        with pytest.raises(NumericsError, match="not finite, or too large") as caught:
            find_grid(weight, options=options("rtn", 2, 16, grid=grid), name="model.layers.3.mlp.up_proj")
        assert "model.layers.3.mlp.up_proj" in str(caught.value)


def test_a_group_size_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(ModelError, match="48 is no multiple of group_size 32"):
        find_grid(gaussian(4, 48), options=options("rtn", 2, 32), name="x")


def test_importance_is_relative_and_absent_without_energy() -> None:
    assert Gram(torch.zeros(8, 8)).importance() is None
    assert torch.equal(Gram(torch.eye(8) * 1e-30).importance(), torch.ones(8))
