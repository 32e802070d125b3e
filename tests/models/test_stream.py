"""Models opened without reading them: the same numbers as loaded whole, one block in memory at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qwha_cli.errors import ArtifactError, ModelError
from qwha_cli.models.load import load
from qwha_cli.models.stream import open_base, open_model
from qwha_cli.models.targets import decoder_blocks, find_targets
from qwha_cli.models.walk import Original, walk
from qwha_cli.models.weights import FileWeights, drop, fill
from qwha_cli.quant.checkpoint import load_base, save_base
from qwha_cli.quant.linear import QuantizedLinear
from support.quantized import options, quantize_blocks
from support.tiny_model import tiny_llama, tiny_qwen2, tiny_tokenizer

TOKENS = torch.arange(60).view(3, 20) % 250


def saved(model: PreTrainedModel, folder: Path, *, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def in_memory(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.is_meta]


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_found_in_files_and_shards_tied_ones_too(tmp_path: Path, shard: str, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    opened = open_model(str(saved(model, tmp_path, shard=shard)), dtype=None)
    assert not opened.resident
    assert in_memory(opened.model) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.weights.read(name), tensor)
    assert opened.num_parameters() == sum(p.numel() for p in model.parameters())
    name = find_targets(model)[3].name
    assert torch.equal(opened.weight(name), model.get_submodule(name).weight)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_parameters_count_once_after_a_walk_too(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    opened = open_model(str(saved(model, tmp_path)), dtype=None)
    for _ in walk(opened.model, TOKENS, weights=opened.weights, device="cpu", batch_size=2, dtype=torch.float32):
        pass
    assert opened.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_walk_is_a_walk_in_memory_to_the_bit(tmp_path: Path, build: type, dtype: torch.dtype) -> None:
    folder = str(saved(build().to(torch.bfloat16), tmp_path))
    opened, model = open_model(folder, dtype=None), load(folder, dtype=None).model
    how = {"device": "cpu", "batch_size": 2, "dtype": dtype}
    blocks = zip(walk(opened.model, TOKENS, weights=opened.weights, **how), walk(model, TOKENS, **how), strict=True)
    seen = 0
    for streamed, resident in blocks:
        assert {name.split(".")[2] for name in in_memory(opened.model)} == {str(streamed.index)}
        names = [t.name for t in find_targets(model) if t.block == resident.index]
        one, other = streamed.grams(names), resident.grams(names)
        assert all(torch.equal(one[name].matrix, other[name].matrix) for name in names)
        streamed.advance()
        resident.advance()
        assert all(torch.equal(a, b) for a, b in zip(streamed.hidden_states, resident.hidden_states, strict=True))
        seen += 1
    assert seen == len(decoder_blocks(model))
    assert in_memory(opened.model) == []


@pytest.mark.parametrize("itself", [True, False])
def test_the_original_runs_beside_a_changed_walk(tmp_path: Path, itself: bool) -> None:
    model = tiny_llama()
    outputs: list[torch.Tensor] = []
    for block in walk(tiny_llama(), TOKENS, device="cpu", batch_size=2):
        block.advance()
        outputs.append(torch.cat(block.hidden_states))
    opened = open_model(str(saved(model, tmp_path)), dtype=None)
    walked = opened.model if itself else model
    weights = opened.weights if itself else None
    original = Original(opened.model, opened.weights)
    for block in walk(walked, TOKENS, device="cpu", batch_size=2, weights=weights, original=original):
        assert torch.equal(torch.cat(block.targets), outputs[block.index])
        with torch.no_grad():
            block.module.get_submodule("mlp.down_proj").weight.zero_()
        block.advance()
        assert not torch.allclose(torch.cat(block.hidden_states), outputs[block.index])


def test_a_quantized_folder_is_opened_with_its_codes_on_the_disk(tmp_path: Path) -> None:
    model = quantize_blocks(tiny_qwen2(), options("gptq", 2, 16, "hadamard", zeros="fine"))
    form = next(m.format for m in model.modules() if isinstance(m, QuantizedLinear))
    save_base(model, tmp_path, tokenizer=tiny_tokenizer(), format=form)
    opened = open_base(tmp_path)
    assert all(buffer.is_meta for m in opened.model.modules() if isinstance(m, QuantizedLinear) for buffer in m.buffers())
    loaded = load_base(tmp_path, dtype=torch.float32)
    for streamed, resident in zip(
        walk(opened.model, TOKENS, device="cpu", batch_size=2, weights=opened.weights),
        walk(loaded, TOKENS, device="cpu", batch_size=2),
        strict=True,
    ):
        streamed.advance()
        resident.advance()
        assert all(torch.equal(a, b) for a, b in zip(streamed.hidden_states, resident.hidden_states, strict=True))
    with pytest.raises(ArtifactError):
        open_base(saved(tiny_llama(), tmp_path / "plain"))


def test_random_models_are_held_in_memory() -> None:
    opened = open_model("random:tiny-llama", dtype=torch.float32, seed=3)
    assert opened.resident
    assert all(torch.equal(opened.weights.read(name), p) for name, p in opened.model.named_parameters())


def test_files_whose_names_are_not_the_architectures_are_loaded_whole(tmp_path: Path) -> None:
    model = tiny_llama()
    saved(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    # transformers finds a decoder's tensors without the head's prefix too
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = open_model(str(tmp_path), dtype=None)
    assert opened.resident
    assert torch.equal(opened.weights.read("model.norm.weight"), model.model.norm.weight)


def test_filling_and_dropping_are_refused_or_exact(tmp_path: Path) -> None:
    model = tiny_llama()
    opened = open_model(str(saved(model, tmp_path)), dtype=None)
    name, block = decoder_blocks(opened.model)[1]
    fill(block, name, opened.weights, device="cpu", dtype=torch.bfloat16)
    expected = model.get_submodule(name).state_dict()
    assert all(torch.equal(t, expected[key].bfloat16()) for key, t in block.state_dict().items())
    drop(block)
    assert all(t.is_meta for t in block.state_dict().values())
    wrong = {f"{name}.mlp.up_proj.weight": torch.zeros(3, 4)}
    save_file(load_file(tmp_path / "model.safetensors") | wrong, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj.weight has shape \(3, 4\)"):
        fill(block, name, FileWeights(tmp_path), device="cpu", dtype=None)
    with pytest.raises(ModelError, match="cannot read the tensor"):
        FileWeights(tmp_path).read("model.nothing")
    with pytest.raises(ModelError, match=r"no \*.safetensors"):
        FileWeights(tmp_path / "elsewhere")
