"""SpectralLinear against dense float64 references, over every kind of base."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qwha_cli.adapters.base_layer import dense_linear
from qwha_cli.adapters.spectral import layer as spectral_layer
from qwha_cli.adapters.spectral.config import Sizes
from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.errors import ArtifactError, ModelError, NumericsError
from qwha_cli.kernels.sparse_matmul import SparseRows
from support.adapted import base_of, dense_delta, dense_weight, random_sparse

BASES = ["linear", "weight", "hadamard"]
MakeLayer = Callable[..., SpectralLinear]


def zeroed(rows: SparseRows) -> SparseRows:
    return rows.with_values(torch.zeros_like(rows.values))


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, 48, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_values_give_the_bases_output_to_the_bit(make_layer: MakeLayer, kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, rows=zeroed(random_sparse((80, 48))))
    if kind == "linear":
        layer.base_layer.to(dtype)
    x = inputs(2, 5).to(dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", BASES)
def test_the_output_is_that_of_the_dense_formula_with_bias(make_layer: MakeLayer, kind: str) -> None:
    layer = make_layer(kind, scale=0.5)
    expected = inputs(7).double() @ (dense_weight(layer.base_layer) + dense_delta(layer.rows("default"), 0.5)).T
    expected = expected + layer.base_layer.bias.double()
    torch.testing.assert_close(layer(inputs(7)).double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", BASES)
def test_gradients_reach_the_values_and_the_input_and_nothing_else(make_layer: MakeLayer, kind: str) -> None:
    layer = make_layer(kind, scale=2.0).train()
    layer.base_layer.requires_grad_(False)
    x = inputs(6).requires_grad_()
    upstream = torch.randn(6, 80, generator=torch.Generator().manual_seed(3))
    layer(x).backward(upstream)

    rows = layer.rows("default")
    values = rows.values.double().requires_grad_()
    reference_x = inputs(6).double().requires_grad_()
    delta = dense_delta(rows.with_values(values), 2.0)
    (reference_x @ (dense_weight(layer.base_layer) + delta).T).backward(upstream.double())
    torch.testing.assert_close(layer.qwha_values["default"].grad.double(), values.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x.grad.double(), reference_x.grad, atol=1e-4, rtol=1e-4)
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["qwha_values.default"]
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())


@pytest.mark.parametrize("kind", BASES)
def test_two_active_adapters_add_up_each_with_its_own_scale(make_layer: MakeLayer, kind: str) -> None:
    layer = make_layer(kind, scale=0.5)
    second = random_sparse((80, 48), seed=9)
    layer.update_layer("second", start=second, scale=-1.5, transform="wht")
    x = inputs(4)
    only_first = layer(x)
    layer.set_adapter(["default", "second"])
    expected = only_first.double() + x.double() @ dense_delta(second, -1.5).T
    torch.testing.assert_close(layer(x).double(), expected, atol=2e-5, rtol=1e-4)
    layer(x).sum().backward()
    assert all(layer.qwha_values[name].grad.abs().sum() > 0 for name in ("default", "second"))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_share_places_are_one_f_whose_places_are_read_once(
    make_layer: MakeLayer, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(kind, scale=0.5)
    first = layer.rows("default")
    layer.update_layer("second", start=first.with_values(first.values.flip(0)), scale=-1.5, transform="wht")
    layer.set_adapter(["default", "second"])
    one = make_layer(kind, rows=first.with_values(0.5 * first.values - 1.5 * first.values.flip(0)))
    x = inputs(4).to(dtype)
    assert torch.equal(layer(x), one(x))
    monkeypatch.setattr(spectral_layer, "read_places", lambda *_, **__: pytest.fail("places were read anew"))
    layer(x).sum().backward()
    one(x).sum().backward()
    gradient = one.qwha_values["default"].grad
    torch.testing.assert_close(layer.qwha_values["default"].grad, 0.5 * gradient)
    torch.testing.assert_close(layer.qwha_values["second"].grad, -1.5 * gradient)


@pytest.mark.parametrize("kind", BASES)
def test_the_identity_transform_adds_f_itself_alone_and_beside_another_adapter(kind: str) -> None:
    layer = SpectralLinear(base_of(kind))
    plain, spectral = random_sparse((80, 48)), random_sparse((80, 48), seed=4)
    layer.update_layer("plain", start=plain, scale=2.0, transform="identity")
    layer.update_layer("wht", start=spectral, scale=1.0, transform="wht")
    x = inputs(4)
    base = x.double() @ dense_weight(layer.base_layer).T + layer.base_layer.bias.double()
    plain_part, spectral_part = x.double() @ (2.0 * plain.dense(torch.float64)).T, x.double() @ dense_delta(spectral, 1.0).T
    layer.set_adapter(["plain"])
    torch.testing.assert_close(layer(x).double(), base + plain_part, atol=2e-5, rtol=1e-4)
    layer.set_adapter(["plain", "wht"])
    torch.testing.assert_close(layer(x).double(), base + plain_part + spectral_part, atol=2e-5, rtol=1e-4)
    merged = dense_weight(layer.base_layer) + 2.0 * plain.dense(torch.float64) + dense_delta(spectral, 1.0)
    torch.testing.assert_close(layer.merged_weight(torch.float32).double(), merged, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", BASES)
def test_merged_and_unmerged_layers_compute_the_same(make_layer: MakeLayer, kind: str) -> None:
    layer = make_layer(kind, scale=0.7)
    x, before_codes = inputs(4), layer.base_layer
    before, base_output = layer(x), before_codes(x).clone()
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == ["default"]
    assert type(layer.base_layer) is nn.Linear
    torch.testing.assert_close(layer(x), before, atol=2e-5, rtol=1e-4)
    layer.unmerge()
    assert not layer.merged
    assert layer.base_layer is before_codes
    torch.testing.assert_close(layer(x), before, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(layer.base_layer(x), base_output, atol=2e-5, rtol=1e-4)


def test_a_second_adapter_merges_on_top_of_the_first_and_both_come_out(make_layer: MakeLayer) -> None:
    layer = make_layer("hadamard")
    layer.update_layer("second", start=random_sparse((80, 48), seed=9), scale=2.0, transform="wht")
    layer.set_adapter(["default", "second"])
    x = inputs(3)
    both = layer(x)
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        layer.merge(adapter_names=["second"])
    torch.testing.assert_close(layer(x), both, atol=2e-5, rtol=1e-4)
    layer.unmerge()
    assert torch.equal(layer(x), both)


def test_safe_merge_refuses_values_that_are_not_finite(make_layer: MakeLayer) -> None:
    layer = make_layer("weight")
    with torch.no_grad():
        layer.qwha_values["default"][0] = torch.nan
    with pytest.raises(NumericsError, match="not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_merging_keeps_the_bias_and_its_dtype() -> None:
    weight, bias = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(4)
    linear = dense_linear(weight, bias)
    assert linear.bias.dtype == torch.bfloat16
    assert torch.equal(linear.bias, bias.bfloat16())
    assert dense_linear(weight, None).bias is None


@pytest.mark.parametrize("kind", BASES)
def test_cached_weights_give_the_same_bits_and_are_dropped_when_values_change(make_layer: MakeLayer, kind: str) -> None:
    layer = make_layer(kind).requires_grad_(False)
    x = inputs(4)
    plain = layer(x)
    layer.cache_weights(True)
    assert torch.equal(layer(x), plain)
    assert torch.equal(layer(x), plain)
    assert len(layer._weights) == 1
    layer(x.bfloat16())
    assert len(layer._weights) == 2, "one weight a dtype"

    with torch.no_grad():
        layer.qwha_values["default"].mul_(2)  # as an optimizer writes
    changed = layer(x)
    layer.cache_weights(False)
    assert len(layer._weights) == 0
    assert torch.equal(layer(x), changed)
    assert not torch.equal(changed, plain)


def test_cached_weights_are_dropped_by_training_loading_and_moving(make_layer: MakeLayer) -> None:
    layer = make_layer("weight").requires_grad_(False)
    layer.cache_weights(True)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = inputs(4)
    first = layer(x)
    assert len(layer._weights) == 1
    layer.train()
    assert len(layer._weights) == 0
    layer.eval()(x)
    layer.load_state_dict({**state, "qwha_values.default": state["qwha_values.default"] * 3})
    assert not torch.equal(layer(x), first)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), first)
    layer.double()
    assert len(layer._weights) == 0


def test_the_cached_weight_is_not_used_while_the_values_want_gradients(make_layer: MakeLayer) -> None:
    layer = make_layer("weight")
    layer.cache_weights(True)
    with torch.no_grad():
        layer(inputs(4))
    layer(inputs(4)).sum().backward()
    assert layer.qwha_values["default"].grad.abs().sum() > 0


def test_what_was_first_used_in_inference_mode_can_be_trained_later(make_layer: MakeLayer) -> None:
    layer = make_layer("hadamard")
    with torch.inference_mode():
        layer(inputs(4))
    layer.train()(inputs(4)).sum().backward()
    assert layer.qwha_values["default"].grad is not None


def test_loading_other_places_moves_the_entries(make_layer: MakeLayer) -> None:
    layer, other = make_layer("linear"), make_layer("linear")
    x = inputs(4)
    before = layer(x)
    rows = layer.rows("default")
    other.set_rows("default", SparseRows.from_mask(rows.dense().flip(1), rows.dense().flip(1) != 0))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)


def test_only_values_and_places_are_in_the_layers_state(make_layer: MakeLayer) -> None:
    layer = make_layer("linear")
    layer.cache_weights(True)
    with torch.no_grad():
        layer(inputs(4))
    own = {name: tensor.dtype for name, tensor in layer.state_dict().items() if not name.startswith("base_layer")}
    assert own == {
        "qwha_values.default": torch.float32,
        "qwha_gaps.default": torch.uint8,
    }


def test_a_layer_of_more_columns_than_16_bits_count_keeps_its_places() -> None:
    layer = SpectralLinear(nn.Linear(70000, 2, bias=False))
    rows = SparseRows(
        torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([5, 69990], dtype=torch.int32), torch.ones(2), (2, 70000)
    )
    layer.update_layer("default", start=rows, scale=1.0, transform="identity")
    found = layer.rows("default")
    assert torch.equal(found.columns, rows.columns)
    assert torch.equal(found.row_starts, rows.row_starts)
    x = torch.zeros(1, 70000)
    x[0, 69990] = 1
    assert torch.allclose(layer(x) - layer.base_layer(x), torch.tensor([[0.0, 1.0]]), atol=1e-6)


@pytest.mark.parametrize("density", [0.0, 0.002, 0.3, 1.0])
def test_rows_put_on_a_layer_come_back_the_same(density: float) -> None:
    mask = torch.rand(80, 48, generator=torch.Generator().manual_seed(2)) < density
    rows = SparseRows.from_mask(torch.randn(80, 48), mask)
    layer = SpectralLinear(base_of("weight"))
    layer.update_layer("default", start=rows, scale=1.0, transform="wht")
    found = layer.rows("default")
    assert all(torch.equal(getattr(found, part), getattr(rows, part)) for part in ("values", "columns", "row_starts"))


def test_places_that_no_file_has_filled_are_an_error_and_no_silent_zero() -> None:
    layer = SpectralLinear(base_of("weight"))
    layer.update_layer("default", start=Sizes(entries=300, gap_bytes=301), scale=1.0, transform="wht")
    layer.set_adapter("default")
    with pytest.raises(ArtifactError, match="adapter default are damaged or were never loaded"):
        layer(inputs(4))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_share_nothing(make_layer: MakeLayer, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    layer = make_layer("hadamard").requires_grad_(False)
    layer.cache_weights(True)
    x = inputs(4)
    before = layer(x)
    twin = duplicate(layer)
    assert len(twin._weights) == 0
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.qwha_values["default"].zero_()
    assert torch.equal(layer(x), before)


def test_writing_values_never_reaches_the_callers_rows(make_layer: MakeLayer) -> None:
    rows = random_sparse((80, 48))
    kept = rows.values.clone()
    layer = make_layer("linear", rows=rows)
    with torch.no_grad():
        layer.qwha_values["default"].zero_()
    assert torch.equal(rows.values, kept)


@pytest.mark.parametrize("kind", BASES)
def test_autocast_computes_in_its_dtype_also_from_the_cache(make_layer: MakeLayer, kind: str) -> None:
    layer = make_layer(kind).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(inputs(4))
        layer.cache_weights(True)
        assert torch.equal(layer(inputs(4)), plain)
    assert plain.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", BASES)
def test_torch_compile_gives_the_same_output_and_gradient(make_layer: MakeLayer, kind: str) -> None:
    layer = make_layer(kind)
    compiled = torch.compile(layer, backend="eager")
    x = inputs(4)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    gradient = layer.qwha_values["default"].grad.clone()
    layer.qwha_values["default"].grad = None
    layer(x).sum().backward()
    torch.testing.assert_close(gradient, layer.qwha_values["default"].grad)


def test_an_unsupported_layer_is_refused_by_name_of_its_type() -> None:
    with pytest.raises(ModelError, match="Conv1d cannot take an adapter"):
        SpectralLinear(nn.Conv1d(3, 3, 1))
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"only nn\.Linear and QuantizedLinear"):
        SpectralLinear(packed)


def test_rows_of_another_shape_are_refused(make_layer: MakeLayer) -> None:
    with pytest.raises(ArtifactError, match=r"\(48, 80\) on one of \(80, 48\)"):
        make_layer("linear").set_rows("default", random_sparse((48, 80)))
