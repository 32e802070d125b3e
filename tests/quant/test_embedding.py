"""A vocabulary in codes: its rows and logits are those of the dequantized matrix, tied or not, in memory, on disk and merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from qwha_cli.adapters.peft_bridge import register
from qwha_cli.adapters.spectral.config import SpectralConfig
from qwha_cli.adapters.spectral.model import spectral_layers
from qwha_cli.errors import ArtifactError, ModelError
from qwha_cli.kernels import wide_linear
from qwha_cli.quant.checkpoint import fingerprint, load_base, save_base
from qwha_cli.quant.embedding import QuantizedEmbedding, TiedHead, Vocabulary, put_vocabulary, vocabulary_in, vocabulary_of
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quantizers.vocabulary import quantize_words, vocabulary_options
from support.adapted import fill
from support.quantized import TOKENS, gaussian, options, quantize_blocks, quantize_words_of
from support.tiny_model import SHAPE, tiny_llama, tiny_qwen2, tiny_tokenizer

register()
CPU = torch.device("cpu")
GROUP = 16


def tiny_gemma(seed: int = 0) -> PreTrainedModel:
    """Its embeddings are scaled, its head tied."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Gemma3TextConfig(**SHAPE, head_dim=12, sliding_window=8, tie_word_embeddings=True)
        model = Gemma3ForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.1)
    return model.float().eval()


def with_bias(model: PreTrainedModel) -> PreTrainedModel:
    model.lm_head.bias = nn.Parameter(gaussian(1, 260)[0])
    return model


MODELS = {
    "untied": tiny_llama,
    "tied": tiny_qwen2,
    "scaled": tiny_gemma,
    "untied, bias": lambda: with_bias(tiny_llama()),
    "tied, bias": lambda: with_bias(tiny_qwen2()),
}
# transformers builds no head with a bias for these
LOADABLE = ["untied", "tied", "scaled"]


def dense_twin(name: str) -> PreTrainedModel:
    """The model whose vocabulary is the dequantized one, made without any of our modules."""
    model = MODELS[name]()
    with torch.no_grad():
        for module in {id(m.weight): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            packed = quantize_words(module.weight, group_size=GROUP, name="twin", device=CPU)
            module.weight.copy_(packed.dequantize(torch.float64))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def base(name: str) -> PreTrainedModel:
    return quantize_words_of(quantize_blocks(MODELS[name](), options("rtn", 4, 16, "hadamard")))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    form = model.model.layers[0].mlp.down_proj.format
    save_base(model, folder, tokenizer=tiny_tokenizer(), format=form)
    return folder


@pytest.mark.parametrize("words", [260, 20_000])
def test_eight_bits_leave_less_than_a_ten_thousandth(words: int) -> None:
    weight = gaussian(words, 48)
    packed = quantize_words(weight, group_size=GROUP, name="test", device=CPU)
    found = packed.dequantize(torch.float64)
    assert (found - weight).square().sum() < 1e-4 * weight.double().square().sum()
    assert packed.bits_per_weight() == 8 + 24 / GROUP
    # a word's codes are its own, whatever goes with it
    alone = quantize_words(weight[words - 3 :], group_size=GROUP, name="test", device=CPU)
    assert torch.equal(alone.dequantize(torch.float64), found[words - 3 :])


def test_an_embedding_gives_the_rows_of_the_dequantized_matrix() -> None:
    plain = nn.Embedding(101, 80)
    packed = quantize_words(plain.weight.detach(), group_size=GROUP, name="test", device=CPU)
    embedding = QuantizedEmbedding(plain, format=packed.format, device="meta")
    embedding.take(packed)
    ids = torch.tensor([[0, 100, 7], [7, 33, 64]])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = embedding.to(dtype)(ids)
        assert torch.equal(found, packed.dequantize(dtype)[ids])
    assert embedding.scales.dtype == torch.float16
    assert list(embedding.state_dict()) == ["qweight", "qzeros", "scales"]
    assert list(embedding.parameters()) == []
    assert embedding(ids[:0]).shape == (0, 3, 80)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_the_dequantized_vocabulary_computes(name: str) -> None:
    expected = logits(dense_twin(name).double())
    model = quantize_words_of(MODELS[name]())
    torch.testing.assert_close(logits(copy.deepcopy(model).double()), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(model).double(), expected, rtol=1e-4, atol=1e-4)
    assert (logits(MODELS[name]().double()) - expected).abs().max() > 1e-4
    generated = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 256}
    assert torch.equal(model.generate(TOKENS, **generated), dense_twin(name).generate(TOKENS, **generated))


def test_a_tied_head_reads_the_embeddings_codes_wherever_they_go() -> None:
    model = quantize_words_of(tiny_qwen2())
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(head, TiedHead)
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16)
    assert head.codes().codes is embedding.qweight
    model.to("meta")
    assert head.codes().device.type == "meta"
    twin = copy.deepcopy(quantize_words_of(tiny_qwen2()))
    assert twin.lm_head.codes().codes is twin.model.embed_tokens.qweight


@pytest.mark.parametrize("name", LOADABLE)
def test_a_folder_gives_the_same_bits_through_plain_transformers(name: str, tmp_path: Path) -> None:
    model = base(name)
    saved(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.qweight" in tensors) is (name == "untied")
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(tensors)
    for loaded in (load_base(tmp_path, dtype=torch.float32), AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")):
        assert torch.equal(logits(loaded), logits(model))
        assert fingerprint(loaded) == fingerprint(model)
        assert vocabulary_in(loaded) == vocabulary_in(model)
    half = load_base(tmp_path, dtype=torch.bfloat16)
    assert half.model.embed_tokens(TOKENS).dtype == torch.bfloat16
    assert half.model.embed_tokens.scales.dtype == torch.float16


def test_no_other_reader_is_told_that_it_could_read_it(tmp_path: Path) -> None:
    model = quantize_words_of(quantize_blocks(tiny_llama(), options("rtn", 4, 16, "weight")))
    config = json.loads((saved(model, tmp_path) / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "qwha"
    assert config["vocabulary"]["embedding"] == "model.embed_tokens"
    assert not {"lm_head", "model.embed_tokens"} & set(config["modules"])


@pytest.mark.parametrize("tensor", ["model.embed_tokens.qweight", "model.embed_tokens.scales"])
def test_a_damaged_vocabulary_is_refused(tensor: str, tmp_path: Path) -> None:
    saved(base("tied"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[tensor].view(torch.uint8)[1, 1] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="incomplete or damaged"):
        load_base(tmp_path, dtype=torch.float32)


def test_the_vocabulary_belongs_to_the_fingerprint() -> None:
    plain = quantize_blocks(tiny_qwen2(), options("rtn", 4, 16, "hadamard"))
    before = fingerprint(plain)
    assert fingerprint(quantize_words_of(plain)) != before


@pytest.mark.parametrize("name", MODELS)
def test_adapters_leave_the_vocabulary_alone_and_merge_into_a_plain_model(name: str, tmp_path: Path) -> None:
    config = SpectralConfig(rank=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(name), config).eval()
    fill(model)
    assert len(spectral_layers(model)) == 3 * 7
    assert not any("lm_head" in layer or "embed" in layer for layer in spectral_layers(model))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(base(name), str(tmp_path / "adapter"))), expected)
    merged = model.merge_and_unload()
    assert type(merged.get_input_embeddings()) is type(MODELS[name]().get_input_embeddings())
    assert type(merged.get_output_embeddings()) is nn.Linear
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    tied = "untied" not in name
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) is tied
    if name not in LOADABLE:
        return
    merged.save_pretrained(tmp_path / "merged")
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) is not tied
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("name", MODELS)
def test_a_head_in_codes_can_be_adapted_too(name: str) -> None:
    model = get_peft_model(base(name), SpectralConfig(rank=4, target_modules=["q_proj", "lm_head"])).eval()
    fill(model)
    assert any("lm_head" in layer for layer in spectral_layers(model))
    expected = logits(model)
    assert not torch.equal(expected, logits(base(name)))
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_flow_through_a_head_in_codes_whose_dense_weight_may_be_too_large(
    wide: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize_words_of(with_bias(tiny_qwen2()) if bias else tiny_qwen2())
    added = model.lm_head.bias.double() if bias else 0
    hidden = gaussian(5, 48, seed=3).double().requires_grad_()
    weight = model.lm_head.dense(torch.float64)
    if wide:
        monkeypatch.setattr(wide_linear, "_WIDE", 259)
        monkeypatch.setattr(wide_linear, "_AT_ONCE", 64)
        # whoever wants the whole head dense shall fail
        monkeypatch.setattr(QuantizedLinear, "dense", None)
        monkeypatch.setattr("qwha_cli.kernels.low_rank.dense_base", None)
    found = model.lm_head(hidden.view(1, 5, 48))
    found.square().sum().backward()
    expected = hidden @ weight.T + added
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden.grad, 2 * expected @ weight, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(hidden), expected, rtol=0, atol=1e-12)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model.lm_head(hidden.float())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.05)
    assert model.lm_head(hidden[:0]).shape == (0, 260)


def test_what_cannot_be_stored_so_is_refused() -> None:
    class Positions(nn.Embedding):
        """Adds something."""

    model = tiny_llama()
    model.set_input_embeddings(Positions(260, 48))
    with pytest.raises(ModelError, match="more than look up rows") as caught:
        vocabulary_of(model, format=vocabulary_options(GROUP).format)
    assert "quantize.embedding_bits=16" in caught.value.remedy
    with pytest.raises(ModelError, match="no multiple of group_size 32"):
        quantize_words(gaussian(33, 48), group_size=32, name="model.embed_tokens", device=CPU)
    with pytest.raises(ArtifactError, match="quantized vocabulary"):
        Vocabulary.from_dict({"embedding": 3})
    foreign = Vocabulary("model.norm", None, False, vocabulary_options(GROUP).format)
    with pytest.raises(ArtifactError, match="not the embedding or head"):
        put_vocabulary(tiny_llama(), foreign)
    assert isinstance(quantize_words_of(tiny_llama()).lm_head, QuantizedLinear)
