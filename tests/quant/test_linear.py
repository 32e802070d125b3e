"""QuantizedLinear: the dense layer's numbers, nothing trainable, and scales that no cast touches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qwha_cli.errors import ModelError
from qwha_cli.kernels.hadamard import dense
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import QuantFormat
from qwha_cli.quant.swap import get_linear, replace
from support.quantized import gaussian, options, run_quantizer

KINDS = [("gptq", 2), ("gptq", 3), ("rtn", 4), ("nf4", 4)]
BASES = ("weight", "hadamard")


def layer_of(method: str, bits: int, basis: str, *, shape: tuple[int, int] = (80, 96), bias: bool = True) -> QuantizedLinear:
    # 96 = 12 * 8: no power of two, and a whole number of bitsandbytes' smallest blocks
    group_size = 32 if method == "nf4" else 16
    packed = run_quantizer(gaussian(*shape), None, options(method, bits, group_size, basis))
    return QuantizedLinear.from_packed(packed, torch.linspace(-1, 1, shape[0]) if bias else None)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("method", "bits"), KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_that_of_the_dense_weight_in_the_weight_basis(method: str, bits: int, basis: str, bias: bool) -> None:
    layer = layer_of(method, bits, basis, bias=bias)
    x = torch.randn(2, 7, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = layer.packed().dequantize(torch.float64)
    expected = x @ (weight @ dense(96).T if basis == "hadamard" else weight).T
    if bias:
        expected = expected + torch.linspace(-1, 1, 80)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6 if method == "nf4" else 1e-12)
    reached = x @ layer.weight_in_weight_basis(torch.float64).T
    torch.testing.assert_close(layer(x) - (layer.bias if bias else 0), reached, rtol=0, atol=1e-12)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (5, 16), (33, 112)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sizes_that_are_no_power_of_two_work(basis: str, shape: tuple[int, int], bits: int) -> None:
    layer = layer_of("rtn", bits, basis, shape=shape)
    x = torch.randn(3, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.weight_in_weight_basis(torch.float64).T + layer.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("basis", BASES)
def test_half_precision_is_within_its_own_rounding(dtype: torch.dtype, basis: str) -> None:
    layer = layer_of("gptq", 4, basis)
    x = torch.randn(16, 96).to(dtype)
    exact = layer(x.double())
    y = layer(x)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("method", ["gptq", "nf4"])
def test_casting_the_model_leaves_codes_and_scales_as_they_are(basis: str, method: str) -> None:
    layer = layer_of(method, 4, basis)
    before = layer.packed().digest()
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        layer.to(dtype)
        assert layer.packed().digest() == before
        assert layer.bias is not None
        assert layer.bias.dtype == dtype
    layer.half().float()
    assert layer.packed().digest() == before


def test_nothing_is_trainable_and_the_gradient_reaches_the_input() -> None:
    layer = layer_of("gptq", 2, "hadamard")
    assert list(layer.parameters()) == []
    x = torch.randn(4, 96, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.weight_in_weight_basis(torch.float64).sum(0).expand(4, -1)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("basis", BASES)
def test_the_dense_weight_is_not_kept_for_the_backward_pass(basis: str) -> None:
    layer = layer_of("gptq", 2, basis)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        layer(torch.randn(4, 96, requires_grad=True))
    assert 80 * 96 not in saved


@pytest.mark.parametrize(("method", "bits"), KINDS)
def test_the_state_dict_is_the_packed_weight_and_round_trips_exactly(method: str, bits: int) -> None:
    layer = layer_of(method, bits, "weight")
    state = layer.state_dict()
    assert set(state) == {*layer.packed().tensors, "bias"}
    other = QuantizedLinear(96, 80, bias=True, format=layer.format)
    other.load_state_dict(state)
    assert other.packed().digest() == layer.packed().digest()
    x = torch.randn(3, 96)
    assert torch.equal(other(x), layer(x))


def test_the_kept_dense_weight_is_the_same_and_in_no_state_dict() -> None:
    layer = layer_of("gptq", 3, "weight")
    x = torch.randn(3, 96)
    fresh, names = layer(x), set(layer.state_dict())
    layer.keep_dense = True
    assert torch.equal(layer(x), fresh)
    assert layer.dense(torch.float32) is layer.dense(torch.float32)
    assert layer.dense(torch.bfloat16).dtype == torch.bfloat16  # another dtype replaces the kept one
    assert set(layer.state_dict()) == names
    assert [name for name, _ in layer.named_buffers()] == [*layer.packed().tensors, "bias"]
    layer.keep_dense = False
    assert layer.dense(torch.float32) is not layer.dense(torch.float32)


def test_the_kept_dense_weight_follows_new_codes() -> None:
    layer = layer_of("gptq", 3, "weight")
    other = QuantizedLinear.from_packed(run_quantizer(gaussian(80, 96, seed=9), None, options("gptq", 3)), layer.bias)
    layer.keep_dense = True
    x = torch.randn(3, 96)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_the_codes_are_one_object_until_a_buffer_is_replaced() -> None:
    layer = layer_of("gptq", 3, "weight")
    first = layer.codes()
    assert layer.codes() is first
    assert layer.operand(torch.float32) is first
    assert first.codes is layer.get_buffer("qweight")
    layer.to(torch.bfloat16)
    for replaced in ("qweight", "scales", "qzeros"):
        before = layer.codes()
        setattr(layer, replaced, layer.get_buffer(replaced).clone())
        assert layer.codes() is not before
        assert layer.codes() is layer.codes()
    twin = copy.deepcopy(layer)
    assert twin.codes().codes is twin.get_buffer("qweight")
    assert twin.codes().codes is not layer.get_buffer("qweight")
    layer.keep_dense = True
    assert layer.operand(torch.float32) is layer.dense(torch.float32)


def test_a_dense_weight_kept_under_inference_mode_serves_training() -> None:
    layer = layer_of("gptq", 3, "hadamard")
    layer.keep_dense = True
    with torch.inference_mode():
        layer(torch.randn(2, 96))
    x = torch.randn(2, 96, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("basis", BASES)
def test_autocast_computes_in_its_own_dtype(basis: str) -> None:
    layer = layer_of("gptq", 4, basis)
    x = torch.randn(2, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_a_copy_shares_nothing_with_the_original() -> None:
    layer = layer_of("gptq", 2, "weight")
    twin = copy.deepcopy(layer)
    twin.get_buffer("qweight").zero_()
    assert twin.packed().digest() != layer.packed().digest()


def test_a_skeleton_on_the_meta_device_can_be_filled() -> None:
    layer = layer_of("nf4", 4, "weight")
    skeleton = QuantizedLinear(96, 80, bias=True, format=layer.format, device="meta")
    assert all(buffer.is_meta for buffer in skeleton.buffers())
    skeleton.load_state_dict(layer.state_dict(), assign=True)
    assert skeleton.packed().digest() == layer.packed().digest()


def test_inputs_that_are_no_whole_number_of_groups_are_refused() -> None:
    with pytest.raises(ModelError, match="48 is no multiple of group_size 32"):
        QuantizedLinear(48, 8, bias=False, format=QuantFormat("gptq", 4, 32, symmetric=False, basis="weight", zero_bits=4))


def test_a_layer_prints_what_it_is() -> None:
    assert "bits=2, group_size=16, basis=hadamard" in repr(layer_of("gptq", 2, "hadamard"))


def test_swapping_finds_and_replaces_linears_by_name() -> None:
    model = nn.Sequential(nn.Linear(96, 80), nn.Sequential(nn.Linear(80, 4), nn.ReLU())).eval()
    layer = layer_of("gptq", 4, "weight")
    replace(model, "0", layer)
    assert get_linear(model, "0") is layer
    assert not layer.training
    assert get_linear(model, "1.0").out_features == 4
    with pytest.raises(ModelError, match="a ReLU is no linear layer"):
        get_linear(model, "1.1")
    for wrong in (lambda: get_linear(model, "1.7"), lambda: replace(model, "1.7", layer)):
        with pytest.raises(ModelError, match=r"layer 1\.7: the model has no such layer"):
            wrong()
