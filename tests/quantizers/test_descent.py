"""Sweeps after GPTQ: the error never rises, what is stored is what was optimised, and fine zero points pay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.kernels.wht import transform_gram, wht
from qwha_cli.quant.error import layer_error
from qwha_cli.quant.gram import Gram
from qwha_cli.quant.packed import PackedWeight
from qwha_cli.quantizers.descent import polish
from qwha_cli.quantizers.grid import find_grid
from support.quantized import correlated_inputs, gaussian, options, run_quantizer


def gram_of(features: int) -> Tensor:
    inputs = correlated_inputs(1024, features)
    return inputs.T @ inputs


def output_error(weight: Tensor, values: Tensor, gram: Tensor) -> Tensor:
    error = (weight - values).double()
    return ((error @ gram.double()) * error).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zeros", ["integer", "fine"])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_no_row_gets_worse_and_more_sweeps_are_better(bits: int, zeros: str, shape: tuple[int, int]) -> None:
    weight, gram = gaussian(*shape), Gram(gram_of(shape[1])).damped(0.01)
    grid = find_grid(weight, options=options("rtn", bits, 16, zeros=zeros), name="x")
    codes = grid.codes(weight)
    before = output_error(weight, grid.values(codes), gram)
    first = before.sum()
    for sweeps in (1, 2, 6):
        found, changed = polish(weight, gram, codes, grid, sweeps=sweeps, block=32)
        after = output_error(weight, changed.values(found), gram)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    assert after.sum() < 0.6 * first
    assert changed.scales.dtype == torch.float16
    assert torch.equal(changed.zeros, changed.storable_zero(changed.zeros))


@pytest.mark.parametrize("block", [1, 7, 128])
def test_the_block_changes_rounding_only(block: int) -> None:
    weight, gram = gaussian(48, 80), gram_of(80)
    expected = layer_error(weight, run_quantizer(weight, gram, options("gptq", 2, 16, sweeps=3)).dequantize(torch.float32), gram)
    packed = run_quantizer(weight, gram, options("gptq", 2, 16, sweeps=3, block=block))
    assert layer_error(weight, packed.dequantize(torch.float32), gram) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
def test_sweeps_and_fine_zero_points_each_take_a_tenth_off_gptqs_error(basis: str) -> None:
    weight, gram = gaussian(128, 192), gram_of(192)
    if basis == "hadamard":
        weight, gram = wht(weight), transform_gram(gram)
    error = lambda **more: layer_error(  # noqa: E731
        weight, run_quantizer(weight, gram, options("gptq", 2, 64, **more)).dequantize(torch.float32), gram
    )
    plain, fine, swept = error(), error(zeros="fine"), error(zeros="fine", sweeps=4)
    assert fine < 0.9 * plain
    assert swept < 0.9 * fine


def test_the_stored_tensors_are_the_ones_that_were_optimised() -> None:
    weight, gram = gaussian(48, 80), gram_of(80)
    packed = run_quantizer(weight, gram, options("gptq", 2, 16, zeros="fine", sweeps=3))
    again = PackedWeight({n: t.clone() for n, t in packed.tensors.items()}, packed.format, packed.shape)
    grid = find_grid(weight, options=options("gptq", 2, 16, zeros="fine"), name="x")
    damped = Gram(gram).damped(0.01)
    start = output_error(weight, grid.values(grid.codes(weight)), damped).sum()
    assert output_error(weight, again.dequantize(torch.float32), damped).sum() < 0.6 * start


def test_groups_of_equal_weights_and_dead_inputs_stay_finite() -> None:
    weight, inputs = gaussian(32, 96), correlated_inputs(512, 96)
    weight[3] = 0
    weight[4] = 0.25
    inputs[:, :20] = 0
    packed = run_quantizer(weight, inputs.T @ inputs, options("gptq", 2, 16, zeros="fine", sweeps=4))
    values = packed.dequantize(torch.float32)
    assert torch.isfinite(values).all()
    assert values[3].abs().max() < 1e-6
    torch.testing.assert_close(values[4], weight[4], rtol=2e-3, atol=0)
