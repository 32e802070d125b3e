"""Saving and loading a quantized model: bit by bit the same, through plain transformers, and never with something missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qwha_cli.errors import ArtifactError, ModelError
from qwha_cli.kernels import hadamard
from qwha_cli.quant.checkpoint import fingerprint, load_base, save_base
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.transformers_plugin import register
from support.quantized import TOKENS, options, quantize_blocks
from support.tiny_model import tiny_llama, tiny_qwen2, tiny_tokenizer

LAYERS = 3 * 7
# nf4's smallest block is 32: sizes that are no powers of two, but multiples of it
FOR_NF4 = {"hidden_size": 96, "intermediate_size": 160}
KINDS = [("gptq", 2), ("rtn", 3), ("gptq", 4), ("nf4", 4)]


def tiny(method: str, bits: int, basis: str, *, family: str = "llama", **overrides: object) -> PreTrainedModel:
    build = tiny_llama if family == "llama" else tiny_qwen2
    sizes = FOR_NF4 if method == "nf4" else {}
    wanted = options(method, bits, 32 if method == "nf4" else 16, basis)
    return quantize_blocks(build(**sizes, **overrides), wanted)


def format_of(model: PreTrainedModel) -> object:
    return next(module.format for module in model.modules() if isinstance(module, QuantizedLinear))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "1-quantize"
    model = tiny("gptq", 3, "hadamard", family="qwen2")
    save_base(model, path, tokenizer=tiny_tokenizer(), format=format_of(model), shard_bytes=40_000)
    return path


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
@pytest.mark.parametrize(("method", "bits"), KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_reloaded_model_has_bitwise_the_same_logits(method: str, bits: int, basis: str, family: str, tmp_path: Path) -> None:
    model = tiny(method, bits, basis, family=family)
    save_base(model, tmp_path, tokenizer=None, format=format_of(model))
    again = load_base(tmp_path, dtype=torch.float32)
    assert sum(isinstance(module, QuantizedLinear) for module in again.modules()) == LAYERS
    assert not again.training
    assert torch.equal(logits(again), logits(model))
    assert fingerprint(again) == fingerprint(model)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_written_once_and_come_back_tied(tied: bool, tmp_path: Path) -> None:
    model = tiny("rtn", 4, "weight", tie_word_embeddings=tied)
    save_base(model, tmp_path, tokenizer=None, format=format_of(model))
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    again = load_base(tmp_path, dtype=torch.float32)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied
    assert torch.equal(logits(again), logits(model))


def test_plain_transformers_loads_it_after_register(folder: Path) -> None:
    register()
    register()
    expected = logits(load_base(folder, dtype=torch.float32))
    for dtype in ("auto", torch.float32, None):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)), expected)
    mapped = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    assert torch.equal(logits(mapped), expected)
    assert AutoTokenizer.from_pretrained(folder)("hello").input_ids == tiny_tokenizer()("hello").input_ids


def test_nothing_needs_a_hadamard_matrix_while_tensors_are_made_on_the_meta_device(folder: Path) -> None:
    hadamard.base_matrix.cache_clear()
    hadamard._digest.cache_clear()
    assert torch.isfinite(logits(load_base(folder, dtype=torch.float32))).all()
    assert not hadamard.base_matrix(12).is_meta


def test_bfloat16_touches_neither_codes_nor_scales(folder: Path) -> None:
    exact, half = load_base(folder, dtype=torch.float32), load_base(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    layer = half.model.layers[0].self_attn.q_proj
    assert (layer.scales.dtype, layer.bias.dtype) == (torch.float16, torch.bfloat16)
    assert fingerprint(half) == fingerprint(exact)
    assert (logits(half).float() - logits(exact)).abs().max() < 0.1 * logits(exact).std()


def test_a_model_saved_in_bfloat16_comes_back_in_it(tmp_path: Path) -> None:
    model = tiny("gptq", 2, "weight", family="qwen2").to(torch.bfloat16)
    save_base(model, tmp_path, tokenizer=None, format=format_of(model))
    again = load_base(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert fingerprint(again) == fingerprint(model)


def test_a_loaded_model_saves_itself_again(folder: Path, tmp_path: Path) -> None:
    model = load_base(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    save_base(model, tmp_path / "ours", tokenizer=None, format=format_of(model))
    for name in ("theirs", "ours"):
        assert torch.equal(logits(load_base(tmp_path / name, dtype=torch.float32)), logits(model))


def test_the_config_says_what_is_stored_and_where(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {k: written[k] for k in ("quant_method", "method", "bits", "group_size", "sym", "basis", "checkpoint_format")} == {
        "quant_method": "qwha",
        "method": "gptq",
        "bits": 3,
        "group_size": 16,
        "sym": False,
        "basis": "hadamard",
        "checkpoint_format": "gptq_v2",
    }
    assert len(written["modules"]) == LAYERS
    assert written["hadamard"] == {"48": hadamard.plan(48).digest, "80": hadamard.plan(80).digest}
    assert written["fingerprint"] == fingerprint(load_base(folder, dtype=torch.float32))
    assert len(list(folder.glob("*.safetensors"))) > 1, "the fixture is to be sharded"


def test_saving_leaves_the_live_models_config_alone(tmp_path: Path) -> None:
    model = tiny("gptq", 2, "weight")
    save_base(model, tmp_path, tokenizer=None, format=format_of(model))
    assert not hasattr(model.config, "quantization_config")


def test_layers_left_in_full_precision_stay_linear(tmp_path: Path) -> None:
    model, whole = tiny("gptq", 4, "weight"), tiny_llama()
    model.model.layers[1].mlp.down_proj = whole.model.layers[1].mlp.down_proj
    save_base(model, tmp_path, tokenizer=None, format=format_of(model))
    again = load_base(tmp_path, dtype=torch.float32)
    assert type(again.model.layers[1].mlp.down_proj) is nn.Linear
    assert torch.equal(logits(again), logits(model))


def test_the_fingerprint_sees_one_changed_code_and_no_wrapper() -> None:
    model = tiny("gptq", 2, "weight")
    before = fingerprint(model)
    wrapped = nn.Module()
    wrapped.base_model = nn.Module()
    wrapped.base_model.model = model
    layer = model.model.layers[2].mlp.up_proj
    tuner = nn.Module()
    tuner.base_layer = layer
    model.model.layers[2].mlp.up_proj = tuner
    assert fingerprint(wrapped) == before
    layer.get_buffer("qweight")[0, 0] += 1
    assert fingerprint(wrapped) != before


def test_a_model_without_quantized_layers_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no quantized layer"):
        fingerprint(tiny_llama())
    with pytest.raises(ModelError, match="no quantized layer"):
        save_base(tiny_llama(), tmp_path, tokenizer=None, format=options().format)


def test_layers_of_two_formats_are_refused(tmp_path: Path) -> None:
    model, other = tiny("gptq", 2, "weight"), tiny("gptq", 3, "weight")
    model.model.layers[1].mlp.down_proj = other.model.layers[1].mlp.down_proj
    with pytest.raises(ModelError, match=r"layer model\.layers\.1\.mlp\.down_proj.*bits=3"):
        save_base(model, tmp_path, tokenizer=None, format=format_of(model))


# ---- damaged and foreign folders: each message names the fault and carries a remedy


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match) as caught:
        load_base(folder, dtype=torch.float32)
    assert caught.value.remedy


def rewrite(folder: Path, change: str, *, drop: bool = False) -> None:
    """Drop a tensor of a sharded folder from its file, or flip a bit in it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][change]
    tensors = load_file(path)
    if drop:
        del tensors[change]
    else:
        tensors[change].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no readable config.json")


def test_an_unquantized_model_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    refused(tmp_path, "no model quantized by qwha: quant_method is None")


def test_a_config_that_is_no_json_is_refused(damaged: Path) -> None:
    (damaged / "config.json").write_text("{")
    refused(damaged, "no readable config.json")


def test_one_flipped_code_is_refused(damaged: Path) -> None:
    rewrite(damaged, "model.layers.1.mlp.up_proj.qweight")
    refused(damaged, "incomplete or damaged: their fingerprint is")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.qweight", "model.layers.0.self_attn.q_proj.scales"])
def test_a_missing_packed_tensor_is_refused_even_by_plain_transformers(damaged: Path, name: str) -> None:
    rewrite(damaged, name, drop=True)
    refused(damaged, "incomplete or damaged")
    with pytest.raises(ArtifactError, match="incomplete or damaged"):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_missing_unpacked_tensor_is_refused_by_name(damaged: Path, name: str) -> None:
    rewrite(damaged, name, drop=True)
    refused(damaged, f"1 tensors are missing: {name}")


def test_a_missing_shard_is_refused(damaged: Path) -> None:
    sorted(damaged.glob("*.safetensors"))[1].unlink()
    refused(damaged, "cannot be read")


def test_a_truncated_file_is_refused(damaged: Path) -> None:
    path = sorted(damaged.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    refused(damaged, "cannot be read")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("bits", 5, "unknown quantization format"),
        ("basis", None, "unknown quantization format"),
        ("modules", ["model.layers.0.mlp.up"], "is no linear layer of a Qwen2ForCausalLM"),
        ("modules", [], "no quantized module is named"),
        ("hadamard", {"48": "0" * 64}, "Hadamard matrix of size 48 whose digest is 000"),
        ("group_size", 7, "no multiple of group_size 7"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(damaged: Path, key: str, value: object, match: str) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"][key] = value
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises((ArtifactError, ModelError), match=match) as caught:
        load_base(damaged, dtype=torch.float32)
    assert caught.value.remedy
