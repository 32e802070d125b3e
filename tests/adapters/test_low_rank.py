"""LoRA on layers of packed codes: the dense formula's numbers, peft's own files, our own checks."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwha_cli.adapters.build import adapted_layers, add_adapter, cache_weights, load_adapter, save_adapter
from qwha_cli.adapters.keep import set_keep
from qwha_cli.adapters.low_rank.layer import LowRankLinear
from qwha_cli.adapters.low_rank.model import LowRankModel
from qwha_cli.adapters.peft_bridge import register
from qwha_cli.adapters.provenance import base_fingerprint
from qwha_cli.errors import ArtifactError, ModelError, NumericsError, UsageError
from qwha_cli.kernels.low_rank import LowRank
from qwha_cli.quant.linear import QuantizedLinear
from support.adapted import base_of, dense_weight, quantize_model
from support.quantized import options, quantize_blocks
from support.tiny_model import tiny_llama, tiny_qwen2

KINDS = ["linear", "weight", "hadamard"]
MODELS = ["weight", "hadamard", "nf4"]
IDS = torch.arange(22).reshape(2, 11)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"


def factors(shape: tuple[int, int], rank: int = 4, *, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, shape[1], generator=generator) * 0.2, torch.randn(shape[0], rank, generator=generator) * 0.2)


def layer_on(kind: str, *, scale: float = 1.0, start: LowRank | None = None) -> LowRankLinear:
    config = LoraConfig(r=4, lora_alpha=1)
    layer = LowRankLinear(base_of(kind), "default", config=config, r=4, lora_alpha=4 * scale)
    layer.set_factors("default", start or factors((80, 48)))
    layer.base_layer.requires_grad_(False)
    return layer.eval()


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 48, generator=torch.Generator().manual_seed(seed))


def base(kind: str = "weight", seed: int = 0) -> nn.Module:
    if kind == "nf4":  # bitsandbytes has no blocks below 32
        model = tiny_qwen2(seed, hidden_size=96, intermediate_size=160)
        return quantize_blocks(model, options("nf4", 4, 32, "hadamard"))
    return quantize_model(tiny_qwen2(seed), kind)


def built(kind: str = "weight", *, seed: int = 0, scale: float = 0.5, rank: int = 4) -> PeftModel:
    model = base(kind, seed)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    start = {name: factors((m.out_features, m.in_features), rank, seed=i) for i, (name, m) in enumerate(linears.items())}
    return add_adapter(model, rank=rank, scale=scale, targets=list(start), start=start).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


# ---- one layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", ["memory", "speed"])
def test_b_of_zero_gives_the_bases_output_to_the_bit(kind: str, dtype: torch.dtype, keep: str) -> None:
    layer = layer_on(kind, start=LowRank(torch.randn(4, 48), torch.zeros(80, 4)))
    layer.keep = keep
    if kind == "linear":
        layer.base_layer.to(dtype)
    x = inputs(2, 5).to(dtype)
    assert torch.equal(layer(x), layer.base_layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_the_dense_formula_with_scale_and_bias(kind: str) -> None:
    layer = layer_on(kind, scale=0.3)
    weight = dense_weight(layer.base_layer) + 0.3 * layer.factors("default").dense(torch.float64)
    expected = inputs(7).double() @ weight.T + layer.base_layer.bias.double()
    torch.testing.assert_close(layer(inputs(7)).double(), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(layer.merged_weight(torch.float32).double(), weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", ["memory", "speed"])
def test_gradients_reach_both_factors_and_the_input_and_nothing_else(kind: str, keep: str) -> None:
    layer = layer_on(kind, scale=2.0).train()
    layer.keep = keep
    x = inputs(6).requires_grad_()
    upstream = torch.randn(6, 80, generator=torch.Generator().manual_seed(3))
    layer(x).backward(upstream)
    value = layer.factors("default")
    a, b, other = value.a.double().requires_grad_(), value.b.double().requires_grad_(), inputs(6).double().requires_grad_()
    (other @ (dense_weight(layer.base_layer) + 2.0 * b @ a).T).backward(upstream.double())
    for found, expected in ((layer.lora_A, a), (layer.lora_B, b)):
        torch.testing.assert_close(found["default"].weight.grad.double(), expected.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x.grad.double(), other.grad, atol=1e-4, rtol=1e-4)
    trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert trained == ["lora_A.default.weight", "lora_B.default.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_its_dtype_and_gradients_stay_float32(kind: str) -> None:
    layer = layer_on(kind).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(inputs(6))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(inputs(6)), atol=0.15, rtol=0.05)
    y.float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == layer.lora_B["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_cached_weights_give_the_same_to_rounding_and_are_dropped_when_factors_change(kind: str) -> None:
    layer = layer_on(kind, scale=0.5).requires_grad_(False)
    x = inputs(4)
    plain = layer(x)
    layer.cache_weights(True)
    torch.testing.assert_close(layer(x), plain, atol=2e-5, rtol=1e-4)
    assert torch.equal(layer(x), layer(x))
    assert len(layer._weights) == 1
    torch.testing.assert_close(layer(x.bfloat16()).float(), plain, atol=0.1, rtol=0.05)
    assert len(layer._weights) == 2, "one weight a dtype"
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(2)  # as an optimizer writes
    changed = layer(x)
    layer.cache_weights(False)
    assert len(layer._weights) == 0
    torch.testing.assert_close(layer(x), changed, atol=2e-5, rtol=1e-4)
    assert (changed - plain).abs().max() > 0.1


def test_the_cached_weight_is_not_used_while_the_factors_want_gradients() -> None:
    layer = layer_on("hadamard")
    layer.cache_weights(True)
    with torch.no_grad():
        layer(inputs(4))
    layer(inputs(4)).sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unmerged_layers_compute_the_same(kind: str) -> None:
    layer = layer_on(kind, scale=0.7)
    x, codes = inputs(4), layer.base_layer
    before = layer(x)
    layer.merge(safe_merge=True)
    assert type(layer.base_layer) is nn.Linear
    torch.testing.assert_close(layer(x), before, atol=2e-5, rtol=1e-4)
    layer.unmerge()
    assert layer.base_layer is codes
    torch.testing.assert_close(layer(x), before, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="not finite"):
        layer.merge(safe_merge=True)


def test_factors_of_another_shape_or_rank_are_refused() -> None:
    layer = layer_on("weight")
    with pytest.raises(ArtifactError, match=r"\(48, 80, 4\) for a layer of \(80, 48, 4\)"):
        layer.set_factors("default", factors((48, 80)))
    with pytest.raises(ArtifactError, match=r"\(80, 48, 3\) for a layer of \(80, 48, 4\)"):
        layer.set_factors("default", factors((80, 48), 3))


def test_variants_that_the_layer_does_not_compute_are_refused() -> None:
    with pytest.raises(UsageError, match="no bias in B"):
        LowRankLinear(base_of("weight"), "default", config=LoraConfig(lora_bias=True), r=4, lora_alpha=4)
    with pytest.raises(ValueError, match="variant"):
        LowRankLinear(base_of("weight"), "default", config=LoraConfig(use_dora=True), r=4, lora_alpha=4)
    with pytest.raises(ModelError, match="Conv1d cannot take an adapter"):
        LowRankLinear(nn.Conv1d(3, 3, 1), "default", config=LoraConfig(), r=2, lora_alpha=2)


# ---- a model


@pytest.mark.parametrize("kind", MODELS)
def test_an_added_lora_has_the_given_factors_and_only_they_train(kind: str) -> None:
    model = built(kind, rank=3)
    layers = adapted_layers(model)
    assert len(layers) == 3 * 7
    for index, layer in enumerate(layers.values()):
        expected = factors((layer.out_features, layer.in_features), 3, seed=index)
        found = layer.factors("default")
        assert torch.equal(found.a, expected.a)
        assert torch.equal(found.b, expected.b)
        assert layer.scaling["default"] == pytest.approx(0.5)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(3 * (layer.in_features + layer.out_features) for layer in layers.values())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_what_was_saved_loads_with_the_same_bits_and_trains_on(tmp_path: Path, kind: str, trainable: bool) -> None:
    model = built(kind)
    for _ in range(2):  # peft updates an existing card
        save_adapter(model, tmp_path, base="some/base")
    assert (tmp_path / "README.md").read_text().count("import qwha_cli.integrations") == 1
    loaded = load_adapter(base(kind), tmp_path, trainable=trainable)
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    if trainable:
        loaded.train()(IDS, labels=IDS).loss.backward()
        grads = [p.grad for layer in adapted_layers(loaded).values() for p in (layer._a("default"), layer._b("default"))]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    else:
        assert not any(p.requires_grad for p in loaded.parameters())


def test_a_bfloat16_base_keeps_float32_factors_through_a_save(tmp_path: Path) -> None:
    def half() -> nn.Module:
        return quantize_model(tiny_llama().bfloat16(), "hadamard")

    model = add_adapter(half(), rank=4, scale=1.0, targets=[Q], start={Q: factors((48, 48))})
    assert adapted_layers(model)[Q].factors("default").a.dtype == torch.float32
    save_adapter(model, tmp_path)
    for low_memory in (False, True):
        register()
        loaded = PeftModel.from_pretrained(half(), str(tmp_path), low_cpu_mem_usage=low_memory)
        assert torch.equal(adapted_layers(loaded)[Q].factors("default").a, factors((48, 48)).a)
        assert torch.equal(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("kind", MODELS)
def test_the_folder_is_a_plain_lora_that_peft_alone_puts_on_the_dequantized_model(tmp_path: Path, kind: str) -> None:
    model = built(kind)
    save_adapter(model, tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "expected.pt")
    dense = add_adapter(base(kind), rank=1, scale=1.0, targets=[Q], start={Q: zero_for(base(kind), Q)}).merge_and_unload()
    dense.save_pretrained(tmp_path / "dense")
    code = (
        "import sys, warnings; warnings.simplefilter('error', UserWarning)\n"
        "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/dense')\n"
        "model = PeftModel.from_pretrained(base, sys.argv[1] + '/adapter').eval()\n"
        "found = model(torch.arange(22).reshape(2, 11)).logits.detach()\n"
        "assert not any(name.startswith('qwha_cli') for name in sys.modules)\n"
        "print(float((found - torch.load(sys.argv[1] + '/expected.pt')).abs().max()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-3
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert set(config) <= set(LoraConfig().to_dict())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = adapted_layers(model)
    assert set(tensors) == {f"base_model.model.{name}.lora_{f}.weight" for name in names for f in "AB"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def zero_for(model: nn.Module, name: str) -> LowRank:
    linear = model.get_submodule(name)
    return LowRank(torch.zeros(1, linear.in_features), torch.zeros(linear.out_features, 1))


@pytest.mark.parametrize("kind", MODELS)
def test_after_one_import_plain_peft_puts_it_on_the_quantized_base(tmp_path: Path, kind: str) -> None:
    model = built(kind)
    save_adapter(model, tmp_path)
    register()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base(kind), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


def test_another_base_is_refused_with_both_fingerprints_and_left_untouched(tmp_path: Path) -> None:
    save_adapter(built(), tmp_path)
    other = base(seed=1)
    before = logits(other)
    with pytest.raises(ArtifactError) as error:
        load_adapter(other, tmp_path, trainable=False)
    assert str(base_fingerprint(base())) in error.value.message
    assert str(base_fingerprint(other)) in error.value.message
    assert "qwha_base.json" in str(error.value.where)
    assert not adapted_layers(other)
    assert torch.equal(logits(other), before)
    with pytest.raises(ArtifactError, match="no quantized layers"):
        load_adapter(tiny_qwen2(), tmp_path, trainable=False)


def damage(folder: Path, kind: str) -> None:
    path, name = folder / "adapter_model.safetensors", f"base_model.model.{Q}.lora_A.weight"
    tensors = load_file(path)
    if kind == "unknown base":
        (folder / "qwha_base.json").unlink()
    elif kind == "broken base":
        (folder / "qwha_base.json").write_text("{")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "shorter":
        save_file({**tensors, name: tensors[name][:-1].clone()}, path, metadata={"format": "pt"})
    else:
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unknown base", r"there is no qwha_base\.json"),
        ("broken base", r"qwha_base\.json cannot be read"),
        ("truncated", "cannot be read"),
        ("shorter", r"should have \(4, 48\) of F32 as lora_A.weight, the file has \(3, 48\)"),
        ("dropped", r"as lora_A.weight, the file has none"),
    ],
)
def test_a_damaged_lora_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    save_adapter(built(), tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(ArtifactError, match=message):
        load_adapter(base(), tmp_path, trainable=False)


def test_saving_the_same_lora_writes_the_same_bytes(tmp_path: Path) -> None:
    model = add_adapter(
        base(), rank=4, scale=0.3, targets=[Q, DOWN], start={Q: factors((48, 48)), DOWN: factors((48, 80), seed=1)}
    )
    save_adapter(model, tmp_path / "a")
    save_adapter(load_adapter(base(), tmp_path / "a", trainable=True), tmp_path / "b")
    for name in ("adapter_model.safetensors", "qwha_base.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in "ab"]
    assert configs[0] == configs[1]
    assert configs[0]["target_modules"] == sorted([Q, DOWN])


@pytest.mark.parametrize("kind", MODELS)
def test_merge_and_unload_gives_an_ordinary_model_with_the_adapted_logits(kind: str) -> None:
    model = add_some(kind)
    before = logits(model)
    model.base_model.model.config.quantization_config = {"quant_method": "qwha"}
    biases = {name: module.bias.clone() for name, module in base(kind).named_modules() if name == Q}
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, atol=1e-3, rtol=1e-3)
    assert not any(isinstance(module, LowRankLinear | QuantizedLinear) for module in merged.modules())
    assert not hasattr(merged.config, "quantization_config")
    projection = merged.get_submodule(Q)
    assert type(projection) is nn.Linear
    assert torch.equal(projection.bias, biases[Q])


def add_some(kind: str) -> PeftModel:
    """A LoRA on two layers: the others stay quantized."""
    model = base(kind)
    shapes = {name: (module.out_features, module.in_features) for name in (Q, DOWN) for module in [model.get_submodule(name)]}
    return add_adapter(
        model, rank=4, scale=0.5, targets=[Q, DOWN], start={name: factors(shape) for name, shape in shapes.items()}
    ).eval()


def test_layers_that_were_kept_in_16_bits_are_adapted_and_merged_too(tmp_path: Path) -> None:
    def mixed() -> nn.Module:
        model = base("hadamard")
        model.model.layers[0].self_attn.q_proj = tiny_qwen2().model.layers[0].self_attn.q_proj
        return model

    model = add_adapter(
        mixed(), rank=4, scale=1.0, targets=[Q, DOWN], start={Q: factors((48, 48)), DOWN: factors((48, 80))}
    ).eval()
    assert {name: type(layer.base_layer) for name, layer in adapted_layers(model).items()} == {
        Q: nn.Linear,
        DOWN: QuantizedLinear,
    }
    save_adapter(model, tmp_path)
    loaded = load_adapter(mixed(), tmp_path, trainable=False)
    before = logits(model)
    assert torch.equal(logits(loaded), before)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), before, atol=1e-3, rtol=1e-3)


def test_settings_for_all_layers_reach_every_layer_and_change_no_gradient() -> None:
    gradients = []
    for keep in ("speed", "block", "memory"):
        model = built("hadamard").train()
        set_keep(model, keep)
        assert {layer.keep for layer in adapted_layers(model).values()} == {keep}
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for found in gradients for one, other in zip(found, gradients[-1], strict=True))
    plain = logits(model.eval())
    cache_weights(model, True)
    torch.testing.assert_close(logits(model), plain, atol=1e-3, rtol=1e-3)
    assert all(len(layer._weights) == 1 for layer in adapted_layers(model).values())


def test_several_adapters_switch_add_up_are_mixed_in_a_batch_and_are_disabled(tmp_path: Path) -> None:
    save_adapter(built(scale=0.5), tmp_path / "one")
    other = built(scale=-1.0, rank=2)
    save_adapter(other, tmp_path / "two")
    model = load_adapter(base(), tmp_path / "one", trainable=False)
    one = logits(model)
    model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(other))
    layer = adapted_layers(model)[DOWN]
    both = dense_weight(layer.base_layer) + sum(layer.get_delta_weight(name).double() for name in ("default", "two"))
    torch.testing.assert_close(
        layer.merged_weight(torch.float32, adapter_names=["default", "two"]).double(), both, atol=1e-5, rtol=1e-4
    )
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["default", "two"]).logits
    torch.testing.assert_close(mixed, torch.stack([one[0], logits(other)[1]]), atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))


def test_a_lora_on_an_unquantized_model_stays_pefts_own() -> None:
    register()
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True))
    assert isinstance(model.base_model, LowRankModel)
    assert not adapted_layers(model)
    assert sum(isinstance(module, PeftLinear) for module in model.modules()) == 6
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(tiny_llama()), atol=1e-4, rtol=1e-4)


def test_distributed_training_is_told_to_leave_codes_alone() -> None:
    model = built()
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    buffers = {name for name, buffer in model.named_buffers() if ".layers." in name and not name.endswith(".bias")}
    assert buffers
    assert buffers <= ignored
    assert not ignored & {name for name, _ in model.named_parameters()}


def test_wrong_layers_are_refused_before_anything_is_changed() -> None:
    model = base()
    with pytest.raises(ModelError, match=f"layer {Q}: no start was computed"):
        add_adapter(model, rank=4, scale=1.0, targets=[Q], start={DOWN: factors((48, 80))})
    assert not adapted_layers(model)
    with pytest.raises(ModelError, match=r"layer model.layers.1.self_attn.q_proj: adapter default has no such layer"):
        built_on_two().base_model.assign("default", {"model.layers.1.self_attn.q_proj": factors((48, 48))})


def built_on_two() -> PeftModel:
    return add_adapter(base(), rank=4, scale=1.0, targets=[Q], start={Q: factors((48, 48))})
