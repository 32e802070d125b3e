"""The tuner in whole models: adding, saving, loading, switching and merging adapters through peft's own calls."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from qwha_cli.adapters.peft_bridge import register
from qwha_cli.adapters.spectral.config import SpectralConfig
from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.adapters.spectral.model import spectral_layers
from qwha_cli.errors import ModelError, UsageError
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.training.engine import Engine
from qwha_cli.training.settings import TrainSettings
from support.adapted import dense_delta, fill, quantize_model
from support.tiny_model import tiny_llama, tiny_qwen2

register()
KINDS = ["linear", "weight", "hadamard"]
FILE = "adapter_model.safetensors"
IDS = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))


def base_model(kind: str, **overrides: object) -> nn.Module:
    model = tiny_qwen2(**overrides)
    return model if kind == "linear" else quantize_model(model, kind)


def adapted(kind: str = "linear", **settings: object) -> PeftModel:
    config = SpectralConfig(**{"rank": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})
    return get_peft_model(base_model(kind), config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit_of_the_output(kind: str) -> None:
    assert torch.equal(logits(adapted(kind)), logits(base_model(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_means_every_linear_layer_but_the_head_with_loras_budget(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(kind, target_modules=None)
    layers = spectral_layers(model)
    assert len(layers) == 3 * 7
    assert not any("lm_head" in name for name in layers)
    for layer in layers.values():
        rows = layer.rows("default")
        assert len(rows.values) == min(4 * (layer.in_features + layer.out_features), layer.in_features * layer.out_features)
        assert rows.counts().min() >= 1
        assert rows.values.abs().max() == 0
        columns = rows.columns.split(rows.counts().tolist())
        assert all((row.diff() > 0).all() and row.min() >= 0 and row.max() < layer.in_features for row in columns)
    model.print_trainable_parameters()
    assert f"trainable params: {sum(len(layer.qwha_values['default']) for layer in layers.values()):,}" in capsys.readouterr().out


def test_places_depend_on_the_seed_and_the_layer_and_repeat_for_the_same_seed() -> None:
    first, again, other = (spectral_layers(adapted(seed=seed)) for seed in (0, 0, 1))
    name, neighbour = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"

    def columns(layers: dict[str, SpectralLinear], layer: str) -> Tensor:
        return layers[layer].rows("default").columns

    assert torch.equal(columns(first, name), columns(again, name))
    assert not torch.equal(columns(first, name), columns(other, name))
    assert not torch.equal(columns(first, name), columns(first, neighbour))


def test_a_rank_beyond_the_layers_size_fills_the_layer() -> None:
    for layer in spectral_layers(adapted(rank=1000)).values():
        assert len(layer.qwha_values["default"]) == layer.in_features * layer.out_features


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_saved_and_reloaded_gives_the_same_bits(tmp_path: Path, kind: str, low_memory: bool) -> None:
    model = adapted(kind, scale=0.5)
    fill(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base_model(kind), str(tmp_path), low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(base_model(kind)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("store", ["bfloat16", "float32"])
def test_frozen_values_keep_the_files_number_format_and_trained_ones_are_float32(tmp_path: Path, store: str) -> None:
    model = get_peft_model(tiny_llama().bfloat16(), SpectralConfig(rank=4, task_type="CAUSAL_LM", store=store)).eval()
    fill(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    for trained, dtype in ((False, getattr(torch, store)), (True, torch.float32)):
        loaded = PeftModel.from_pretrained(tiny_llama().bfloat16(), str(tmp_path), is_trainable=trained).eval()
        assert torch.equal(logits(loaded), logits(model))
        values = [layer.qwha_values["default"] for layer in spectral_layers(loaded).values()]
        assert {(value.dtype, value.requires_grad) for value in values} == {(dtype, trained)}


def test_frozen_values_become_float32_when_they_are_to_be_trained(tmp_path: Path) -> None:
    model = adapted("hadamard")
    fill(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base_model("hadamard"), str(tmp_path))
    loaded.set_adapter("default")
    values = [layer.qwha_values["default"] for layer in spectral_layers(loaded).values()]
    assert {(value.dtype, value.requires_grad) for value in values} == {(torch.float32, True)}
    assert torch.equal(logits(loaded), logits(model))


def test_a_file_in_float32_is_not_rounded_because_its_config_says_bfloat16(tmp_path: Path) -> None:
    model = adapted("hadamard", store="float32")
    fill(model, dtype=torch.float32)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"store": "float32"', '"store": "bfloat16"'))
    loaded = PeftModel.from_pretrained(base_model("hadamard"), str(tmp_path))
    assert loaded.peft_config["default"].store == "bfloat16"
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bfloat16_values_give_the_output_of_the_same_numbers_in_float32_to_the_bit(
    kind: str, dtype: torch.dtype, scale: float
) -> None:
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    model = adapted(kind, scale=scale).to(dtype)
    fill(model)
    for layer in spectral_layers(model).values():
        if layer.in_features != 48:
            continue
        layer.requires_grad_(False)
        few, delta, merged = layer(x[:1]), layer.get_delta_weight("default"), layer.merged_weight(torch.float32)
        many, rows = layer(x), layer.rows("default").values
        layer.freeze("default")
        assert layer.qwha_values["default"].dtype == torch.bfloat16
        assert torch.equal(layer(x[:1]), few)
        assert torch.equal(layer(x), many)
        assert torch.equal(layer.get_delta_weight("default"), delta)
        assert torch.equal(layer.merged_weight(torch.float32), merged)
        assert torch.equal(layer.rows("default").values, rows)
        layer.cache_weights(True)
        assert torch.equal(layer(x), many)


@pytest.mark.parametrize("how", ["set_adapter", "set_requires_grad", "requires_grad_"])
def test_values_that_become_trainable_are_float32_however_they_do(how: str, tmp_path: Path) -> None:
    model = adapted("hadamard")
    fill(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base_model("hadamard"), str(tmp_path))
    assert {layer.qwha_values["default"].dtype for layer in spectral_layers(loaded).values()} == {torch.bfloat16}
    if how == "set_adapter":
        loaded.set_adapter("default")
    elif how == "set_requires_grad":
        loaded.set_requires_grad("default", True)
    else:
        for layer in spectral_layers(loaded).values():
            layer.qwha_values["default"].requires_grad_(True)
        # whoever writes into the parameters gets float32 when training begins
        Engine(loaded, settings=TrainSettings(lr=1e-3, steps=1, pad_id=0))
    values = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
    assert len(values) == 3 * 7
    assert {value.dtype for value in values} == {torch.float32}


def test_values_that_bfloat16_does_not_hold_are_frozen_as_they_are() -> None:
    model = adapted("weight")
    fill(model, dtype=torch.float32)
    layer = next(iter(spectral_layers(model).values()))
    before = layer.qwha_values["default"].clone()
    layer.freeze("default")
    assert not layer.qwha_values["default"].requires_grad
    assert torch.equal(layer.qwha_values["default"], before)


def test_two_frozen_adapters_in_bfloat16_add_up_as_in_float32() -> None:
    model = adapted("hadamard", scale=0.3)
    model.add_adapter("other", SpectralConfig(rank=3, scale=0.7, target_modules="all-linear", task_type="CAUSAL_LM"))
    fill(model, adapter="default", seed=1)
    fill(model, adapter="other", seed=2)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    for layer in spectral_layers(model).values():
        layer.freeze("default")
        layer.freeze("other")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_files_round_once(tmp_path: Path, low_memory: bool, autocast: bool) -> None:
    model = adapted()
    fill(model, dtype=torch.float32)
    model.save_pretrained(tmp_path / "once", save_embedding_layers=False)
    assert {layer.qwha_values["default"].dtype for layer in spectral_layers(model).values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(
        base_model("linear"), str(tmp_path / "once"), low_cpu_mem_usage=low_memory, autocast_adapter_dtype=autocast
    )
    for name, layer in spectral_layers(loaded).items():
        trained = spectral_layers(model)[name].qwha_values["default"]
        assert torch.equal(layer.qwha_values["default"], trained.bfloat16())
        assert not torch.equal(layer.qwha_values["default"].float(), trained)
    loaded.save_pretrained(tmp_path / "twice", save_embedding_layers=False)
    assert (tmp_path / "once" / FILE).read_bytes() == (tmp_path / "twice" / FILE).read_bytes()


def test_float32_files_lose_nothing(tmp_path: Path) -> None:
    model = adapted("hadamard", store="float32")
    fill(model, dtype=torch.float32)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base_model("hadamard"), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].store == "float32"


def test_two_adapters_of_two_number_formats_live_on_one_model_and_keep_them(tmp_path: Path) -> None:
    for name, store, rank in (("short", "bfloat16", 2), ("exact", "float32", 4)):
        model = adapted("weight", store=store, rank=rank)
        fill(model, dtype=torch.float32, seed=rank)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    model = PeftModel.from_pretrained(base_model("weight"), str(tmp_path / "short"), adapter_name="short")
    model.load_adapter(str(tmp_path / "exact"), adapter_name="exact")
    model.save_pretrained(tmp_path / "both", save_embedding_layers=False)
    for name in ("short", "exact"):
        assert (tmp_path / "both" / name / FILE).read_bytes() == (tmp_path / name / FILE).read_bytes()


def test_the_file_holds_values_and_places_and_nothing_else_whatever_is_cached(tmp_path: Path) -> None:
    model = adapted("hadamard")
    for layer in spectral_layers(model).values():
        layer.cache_weights(True)
    logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    tensors = load_file(tmp_path / FILE)
    names = set(spectral_layers(model))
    kinds = {"qwha_values": torch.bfloat16, "qwha_gaps": torch.uint8}
    assert set(tensors) == {f"base_model.model.{name}.{kind}" for name in names for kind in kinds}
    assert all(tensor.dtype == kinds[name.rpartition(".")[2]] for name, tensor in tensors.items())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "QWHA"
    name = "model.layers.0.mlp.up_proj"
    assert config["store"] == "bfloat16"
    assert config["entries"][name] == len(tensors[f"base_model.model.{name}.qwha_values"]) == 4 * (48 + 80)
    assert config["gap_bytes"][name] == len(tensors[f"base_model.model.{name}.qwha_gaps"]) == 4 * (48 + 80) + 1
    assert set(config["hadamard_digest"]) == {"48", "80"}
    assert len(config["base_fingerprint"]) == 64


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    model = adapted(exclude_modules=["q_proj", "down_proj"])
    for folder in ("a", "b"):
        copy.deepcopy(model).save_pretrained(tmp_path / folder, save_embedding_layers=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_adapter_of_another_size_loads_switches_sums_and_goes(tmp_path: Path, kind: str) -> None:
    small, large = adapted(kind, rank=2, target_modules=["q_proj", "up_proj"]), adapted(kind, rank=8)
    for name, model in (("small", small), ("large", large)):
        fill(model, seed=len(name))
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    model = PeftModel.from_pretrained(base_model(kind), str(tmp_path / "small"), adapter_name="small")
    model.load_adapter(str(tmp_path / "large"), adapter_name="large")
    assert torch.equal(logits(model), logits(small))
    model.set_adapter("large")
    assert torch.equal(logits(model), logits(large))

    model.base_model.set_adapter(["small", "large"])
    name = "model.layers.0.self_attn.q_proj"
    layers = spectral_layers(model)
    expected = sum(dense_delta(layers[name].rows(adapter), 1.0) for adapter in ("small", "large"))
    base = spectral_layers(model)[name].merged_weight(torch.float32, adapter_names=[])
    torch.testing.assert_close(layers[name].merged_weight(torch.float32).double(), base + expected, atol=1e-5, rtol=1e-4)
    both = logits(model)
    assert not torch.equal(both, logits(large))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model(kind)))
    assert torch.equal(logits(model), both)

    model.set_adapter("small")
    model.delete_adapter("large")
    assert torch.equal(logits(model), logits(small))
    assert all(list(layer.qwha_gaps.keys()) in ([], ["small"]) for layer in spectral_layers(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_gives_an_ordinary_model(kind: str) -> None:
    model = adapted(kind, exclude_modules=["k_proj"])
    fill(model)
    before = logits(model)
    model.base_model.model.config.quantization_config = {"quant_method": "qwha"}
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, SpectralLinear | QuantizedLinear) for module in merged.modules())
    assert not hasattr(merged.config, "quantization_config")
    projection = merged.model.layers[0].self_attn.q_proj
    assert type(projection) is nn.Linear
    assert torch.equal(projection.bias, tiny_qwen2().model.layers[0].self_attn.q_proj.bias)
    assert set(merged.state_dict()) == set(tiny_qwen2().state_dict())


def test_merging_into_a_bfloat16_model_gives_bfloat16_weights() -> None:
    model = get_peft_model(quantize_model(tiny_llama().bfloat16(), "hadamard"), SpectralConfig(rank=4))
    fill(model)
    assert {parameter.dtype for parameter in model.merge_and_unload().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_merge_adapter_and_unmerge_adapter_undo_each_other(kind: str) -> None:
    model = adapted(kind)
    fill(model)
    before = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_unload_gives_the_base_back(kind: str) -> None:
    model = adapted(kind)
    fill(model)
    assert torch.equal(logits(model.unload()), logits(base_model(kind)))


@pytest.mark.parametrize(("kind", "checkpointing"), [("linear", False), ("weight", False), ("hadamard", True)])
def test_the_loss_falls_and_only_values_move(kind: str, checkpointing: bool) -> None:
    model = adapted(kind).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if "qwha_values" not in name}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 3 * 7
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted("hadamard").train()
        fill(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([layer.qwha_values["default"].grad for layer in spectral_layers(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_compiled_model_gives_the_same_logits() -> None:
    config = SpectralConfig(rank=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    model = get_peft_model(quantize_model(tiny_llama(num_hidden_layers=1), "weight"), config).eval()
    fill(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), logits(model), atol=1e-5, rtol=1e-5)


def test_generation_with_cached_weights_gives_the_same_tokens() -> None:
    model = adapted("weight")
    fill(model)
    plain = model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)
    for layer in spectral_layers(model).values():
        layer.cache_weights(True)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False), plain)
    assert plain.shape[1] > IDS.shape[1]


def test_it_converts_to_lora_which_at_full_rank_is_the_same_model() -> None:
    model = adapted(target_modules=["q_proj"])
    fill(model)
    assert model.supports_lora_conversion()
    before = logits(model)
    config, tensors = convert_to_lora(model, rank=48)
    lora = get_peft_model(base_model("linear"), config)
    lora.load_state_dict({key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}, strict=False)
    torch.testing.assert_close(logits(lora.eval()), before, atol=1e-3, rtol=1e-3)


def test_distributed_training_is_told_to_leave_places_and_codes_alone() -> None:
    model = adapted("weight")
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    buffers = {name for name, buffer in model.named_buffers() if ".layers." in name and not name.endswith(".bias")}
    assert buffers
    assert buffers <= ignored
    assert not ignored & {name for name, _ in model.named_parameters()}


def test_an_unsupported_layer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layer model\.embed_tokens: a Embedding cannot") as error:
        get_peft_model(tiny_llama(), SpectralConfig(target_modules=["embed_tokens"]))
    assert "exclude" in str(error.value.remedy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"scale": float("nan")}, "scale nan"),
        ({"transform": "dct"}, "no transform 'dct'"),
        ({"store": "int8"}, "no store 'int8'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SpectralConfig(**settings)
