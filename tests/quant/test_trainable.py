"""TrainableQuantizedLinear: the quantized layer's numbers at the start, true gradients, and nothing that cannot be stored."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from qwha_cli.errors import KernelError
from qwha_cli.kernels.hadamard import dense
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.trainable import TrainableQuantizedLinear
from support.quantized import gaussian, options, run_quantizer

BASES = ("weight", "hadamard")
SHAPE = (48, 80)
# bits and how zeros are stored; 4-bit codes have four-bit zeros either way
GRIDS = [(2, "integer"), (2, "fine"), (3, "integer"), (3, "fine"), (4, "integer")]
TRAINED = {"the grid": False, "grid and rounding": True}


def made(
    bits: int = 2,
    zeros: str = "fine",
    basis: str = "weight",
    *,
    rounding: bool = False,
    shape: tuple[int, int] = SHAPE,
    weight: Tensor | None = None,
    **more: object,
) -> tuple[QuantizedLinear, TrainableQuantizedLinear]:
    """A layer rounded to nearest, with a bias, and its trainable form; the weight is in the codes' basis."""
    weight = gaussian(*shape, seed=bits) if weight is None else weight
    packed = run_quantizer(weight, None, options("rtn", bits, 16, basis, zeros=zeros, **more))
    layer = QuantizedLinear.from_packed(packed, torch.linspace(-1, 1, shape[0]))
    return layer, TrainableQuantizedLinear(layer, weight=weight if rounding else None)


def shaken(layer: TrainableQuantizedLinear, seed: int = 0) -> TrainableQuantizedLinear:
    """Somewhere on the way: scales changed by up to a fifth, zeros and roundings between their steps and beyond their bounds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, width in ((layer.scale_change, 0.2), (layer.zeros, 0.75 * 2**layer.format.bits), (layer.rounding, 1.0)):
            if parameter is not None:
                parameter += (torch.rand(parameter.shape, generator=generator) * 2 - 1) * width
    return layer


def fit(layer: TrainableQuantizedLinear, *, steps: int = 32, rate: float = 0.02, seed: int = 5) -> None:
    """A few steps of Adam towards another layer's outputs."""
    target = gaussian(layer.out_features, layer.in_features, seed=seed)
    x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(seed))
    groups = [{"params": [parameter], "lr": rate} for parameter, _ in layer.learning_rates(grid=1.0, rounding=1.0)]
    optimizer = torch.optim.Adam(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - x @ target.T).square().mean().backward()
        optimizer.step()


def steps_of(layer: TrainableQuantizedLinear) -> float:
    return 2.0 ** (layer.format.bits - layer.format.zero_bits)


def wide(grid: Tensor) -> Tensor:
    return grid.repeat_interleave(16, dim=1)


# ---- the start


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("bits", "zeros"), GRIDS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("shape", [SHAPE, (33, 112)])
def test_it_starts_as_the_quantized_layer_to_the_bit(
    bits: int, zeros: str, basis: str, trained: str, shape: tuple[int, int]
) -> None:
    layer, trainable = made(bits, zeros, basis, rounding=TRAINED[trained], shape=shape)
    assert trainable.weight().dtype == torch.float32
    assert torch.equal(trainable.weight(), layer.dense(torch.float32))
    x = torch.randn(2, 7, shape[1], generator=torch.Generator().manual_seed(1))
    assert torch.equal(trainable(x), layer(x))
    # against float64, where the basis is a dense matrix
    weight = layer.packed().dequantize(torch.float64)
    expected = x.double() @ (weight @ dense(shape[1]).T if basis == "hadamard" else weight).T + layer.bias
    torch.testing.assert_close(trainable(x.double()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("bits", "zeros"), GRIDS)
@pytest.mark.parametrize("trained", TRAINED)
def test_packed_untrained_it_is_the_layers_own_codes_zeros_and_scales(bits: int, zeros: str, basis: str, trained: str) -> None:
    layer, trainable = made(bits, zeros, basis, rounding=TRAINED[trained])
    assert trainable.packed().digest() == layer.packed().digest()


@pytest.mark.parametrize("basis", BASES)
def test_codes_far_from_their_weights_are_kept_when_rounding_is_trained(basis: str) -> None:
    layer, _ = made(2, "fine", basis)
    trainable = TrainableQuantizedLinear(layer, weight=gaussian(*SHAPE, seed=99, std=1.0))
    assert trainable.packed().digest() == layer.packed().digest()
    assert torch.equal(trainable.weight(), layer.dense(torch.float32))


@pytest.mark.parametrize(("bits", "zeros"), GRIDS)
def test_roundings_start_where_the_weights_lie_inside_their_codes_intervals(bits: int, zeros: str) -> None:
    weight = gaussian(*SHAPE, seed=bits)
    layer, trainable = made(bits, zeros, rounding=True)
    codes, scales, offsets = layer.packed().codes()
    place = weight.double() / wide(scales.double()) + wide(offsets.double())
    distance = place - codes
    start = trainable.rounding.detach().double().view(SHAPE)
    inside = distance.abs() <= 0.45
    assert 0.5 < inside.double().mean() < 1  # both kinds are there
    torch.testing.assert_close(start[inside], place[inside], rtol=0, atol=1e-5)
    torch.testing.assert_close((start - codes)[~inside], 0.45 * distance[~inside].sign(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_give_the_quantized_layers_output(basis: str, dtype: torch.dtype) -> None:
    layer, trainable = made(3, "fine", basis, rounding=True)
    x = torch.randn(5, 80)
    expected = layer(x.to(dtype))
    assert trainable(x.to(dtype)).dtype == dtype
    assert torch.equal(trainable(x.to(dtype)), expected)
    with torch.autocast("cpu", dtype):
        y = trainable(x)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


def test_a_layer_without_a_bias_stays_without() -> None:
    packed = run_quantizer(gaussian(*SHAPE), None, options("rtn", 2, 16))
    layer = QuantizedLinear.from_packed(packed)
    x = torch.randn(3, 80)
    assert torch.equal(TrainableQuantizedLinear(layer)(x), layer(x))


def test_nf4_is_refused() -> None:
    packed = run_quantizer(gaussian(48, 96), None, options("nf4", 4, 32))
    with pytest.raises(KernelError, match="nf4"):
        TrainableQuantizedLinear(QuantizedLinear.from_packed(packed))


# ---- gradients


def _reference(layer: TrainableQuantizedLinear, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Q̂ made densely in float64 out of the trained numbers, zeros and codes as they are used; its leaves by name."""
    top, step = (1 << layer.format.bits) - 1, steps_of(layer)
    zeros = layer.zeros.detach().double().clamp(0, 1 + top - step)
    codes = layer._codes if layer.rounding is None else layer.rounding
    leaves = {
        "scale_change": layer.scale_change.detach().double(),
        "zeros": (zeros / step).round() * step,
        "rounding": codes.detach().double().clamp(0, top).round(),
    }
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    scales = layer._scales.double() * (1 + leaves["scale_change"])
    weight = (leaves["rounding"].reshape(SHAPE) - wide(leaves["zeros"])) * wide(scales)
    z = x @ dense(SHAPE[1]) if layer.basis == "hadamard" else x
    return z @ weight.T + layer.bias.double(), leaves


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("bits", "zeros"), GRIDS)
@pytest.mark.parametrize("trained", TRAINED)
def test_gradients_are_those_of_the_dense_weight_passed_straight_through_the_rounding(
    bits: int, zeros: str, basis: str, trained: str
) -> None:
    layer = shaken(made(bits, zeros, basis, rounding=TRAINED[trained])[1])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 80, dtype=torch.float64, generator=generator)
    towards = torch.randn(9, 48, dtype=torch.float64, generator=generator)
    expected, leaves = _reference(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    (expected * towards).sum().backward()
    (layer(x) * towards).sum().backward()

    def close(found: Tensor, wanted: Tensor) -> None:
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(found.double(), wanted.reshape(found.shape), rtol=1e-4, atol=1e-4)

    close(layer.scale_change.grad, leaves["scale_change"].grad)
    # cut off where the bounds of what can be stored cut, and there only
    free = (layer.zeros >= 0) & (layer.zeros <= (1 << bits) - steps_of(layer))
    assert 0 < free.double().mean() < 1
    close(layer.zeros.grad, leaves["zeros"].grad * free)
    if layer.rounding is not None:
        free = (layer.rounding >= 0) & (layer.rounding <= (1 << bits) - 1)
        assert 0 < free.double().mean() < 1
        close(layer.rounding.grad, leaves["rounding"].grad.reshape(free.shape) * free)


@pytest.mark.parametrize("basis", BASES)
def test_the_gradient_of_scales_is_the_finite_difference_in_float64(basis: str) -> None:
    layer = shaken(made(2, "fine", basis, rounding=True)[1]).double()
    x = torch.randn(2, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    change = layer.scale_change.detach()[:, :1].clone().requires_grad_(True)
    others = layer.scale_change.detach()[:, 1:]

    def output(first: Tensor) -> Tensor:
        return functional_call(layer, {"scale_change": torch.cat([first, others], dim=1)}, (x,))

    assert torch.autograd.gradcheck(output, (change,), atol=1e-7)


@pytest.mark.parametrize("basis", BASES)
def test_the_gradient_reaches_the_input(basis: str) -> None:
    layer, trainable = made(3, "fine", basis)
    x = torch.randn(4, 80, dtype=torch.float64, requires_grad=True)
    trainable(x).sum().backward()
    expected = layer.weight_in_weight_basis(torch.float64).sum(0).expand(4, -1)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)


# ---- after training


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("bits", "zeros"), GRIDS)
@pytest.mark.parametrize("trained", TRAINED)
def test_what_is_stored_after_training_is_the_trained_weight_up_to_float16_scales(
    bits: int, zeros: str, basis: str, trained: str
) -> None:
    layer, trainable = made(bits, zeros, basis, rounding=TRAINED[trained])
    before = layer.packed().digest()
    fit(trainable)
    packed, weight = trainable.packed(), trainable.weight().detach()
    assert not torch.equal(weight, layer.dense(torch.float32))
    assert packed.format == layer.format
    stored = packed.dequantize(torch.float32)
    assert ((stored - weight).abs() <= 2.0**-11 * weight.abs()).all()  # half of float16's spacing, relative
    codes, scales, offsets = packed.codes()
    old_codes, old_scales, old_offsets = layer.packed().codes()
    assert (scales != old_scales).float().mean() > 0.5
    assert torch.equal(codes, old_codes) != TRAINED[trained]
    assert torch.equal(offsets, trainable._used_zeros())
    assert not torch.equal(offsets, old_offsets)
    assert layer.packed().digest() == before  # it was not the layer that was trained
    again = TrainableQuantizedLinear(QuantizedLinear.from_packed(packed, layer.bias))
    assert again.packed().digest() == packed.digest()


@pytest.mark.parametrize(("bits", "zeros"), GRIDS)
def test_zeros_stay_steps_of_the_format_inside_the_grid(bits: int, zeros: str) -> None:
    _, layer = made(bits, zeros)
    step, top = steps_of(layer), (1 << bits) - steps_of(layer)
    assert step == (2.0 ** (bits - 4) if zeros == "fine" else 1.0)
    wanted = torch.linspace(-5, (1 << bits) + 5, layer.zeros.numel()).view_as(layer.zeros)
    with torch.no_grad():
        layer.zeros.copy_(wanted)
    offsets = layer.packed().codes()[2]
    assert torch.equal(offsets % step, torch.zeros_like(offsets))
    assert (offsets.min().item(), offsets.max().item()) == (0.0, top)
    # the nearest one, so nothing else is stored than what the weight is made with
    assert ((offsets - wanted.clamp(0, top)).abs() <= step / 2).all()
    assert ((layer.packed().dequantize(torch.float32) - layer.weight()).abs() <= 2.0**-11 * layer.weight().abs()).all()


def test_codes_stay_inside_the_grid_wherever_roundings_go() -> None:
    for bits in (2, 3, 4):
        _, layer = made(bits, rounding=True)
        with torch.no_grad():
            layer.rounding.copy_(torch.linspace(-9, 25, layer.rounding.numel()).view_as(layer.rounding))
        codes = layer.packed().codes()[0]
        expected = layer.rounding.detach().clamp(0, (1 << bits) - 1).round().view(SHAPE)
        assert torch.equal(codes.float(), expected)
        assert ((layer.packed().dequantize(torch.float32) - layer.weight()).abs() <= 2.0**-11 * layer.weight().abs()).all()


@pytest.mark.parametrize("change", [-1.0, -1.5, -100.0, -1e30])
@pytest.mark.parametrize("trained", TRAINED)
def test_scales_stay_positive_whatever_they_are_changed_by(change: float, trained: str) -> None:
    layer, trainable = made(2, rounding=TRAINED[trained])
    with torch.no_grad():
        trainable.scale_change[::2] = change
    scales = trainable.packed().codes()[1]
    assert (scales > 0).all()
    assert torch.equal(scales[1::2], layer.packed().codes()[1][1::2])
    assert trainable.weight().isfinite().all()
    # codes keep their signs around the zero: a scale below zero would turn them around
    assert torch.equal(trainable.weight().sign(), layer.dense(torch.float32).sign())


@pytest.mark.parametrize(("bits", "trained"), itertools.product((2, 4), TRAINED))
def test_symmetric_formats_keep_their_zeros_in_the_middle(bits: int, trained: str) -> None:
    layer, trainable = made(bits, "integer", symmetric=True, rounding=TRAINED[trained])
    assert layer.format.symmetric
    offered = [parameter for parameter, _ in trainable.learning_rates(grid=1.0, rounding=1.0)]
    assert all(parameter is not trainable.zeros for parameter in offered)
    fit(trainable)
    assert trainable.zeros.grad is None
    _, scales, offsets = trainable.packed().codes()
    assert torch.equal(offsets, torch.full_like(offsets, 1 << (bits - 1)))
    assert not torch.equal(scales, layer.packed().codes()[1])


@pytest.mark.parametrize("trained", TRAINED)
def test_each_kind_of_parameter_has_its_own_rate_and_all_are_offered(trained: str) -> None:
    _, layer = made(rounding=TRAINED[trained])
    rates = {id(parameter): rate for parameter, rate in layer.learning_rates(grid=0.25, rounding=0.5)}
    expected = {id(layer.scale_change): 0.25, id(layer.zeros): 0.25}
    if TRAINED[trained]:
        expected[id(layer.rounding)] = 0.5
    assert rates == expected
    assert set(rates) == {id(parameter) for parameter in layer.parameters()}


@pytest.mark.parametrize("trained", TRAINED)
def test_groups_of_tiny_weights_start_as_they_are_too(trained: str) -> None:
    weight = gaussian(*SHAPE)
    weight[3] *= 1e-4  # its scales are subnormal in float16
    weight[4] = 0
    layer, trainable = made(2, "fine", rounding=TRAINED[trained], weight=weight)
    assert torch.equal(trainable.weight(), layer.dense(torch.float32))
    assert trainable.packed().digest() == layer.packed().digest()
