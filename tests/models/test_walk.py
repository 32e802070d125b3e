from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from qwha_cli.errors import ModelError
from qwha_cli.models.targets import decoder_blocks, find_targets
from qwha_cli.models.walk import walk
from support.tiny_model import tiny_llama, tiny_qwen2

SIZES: dict[str, object] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _from(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "mistral with a window": lambda: _from(MistralConfig(**SIZES, sliding_window=6)),
    "qwen3": lambda: _from(Qwen3Config(**SIZES)),
    "gemma": lambda: _from(GemmaConfig(**SIZES)),
    # windows shorter than the text, and full and sliding layers in turn
    "gemma2": lambda: _from(Gemma2Config(**SIZES, sliding_window=6)),
    "gemma3": lambda: _from(Gemma3TextConfig(**SIZES, sliding_window=6, sliding_window_pattern=2, query_pre_attn_scalar=12)),
    "phi": lambda: _from(PhiConfig(**SIZES, partial_rotary_factor=0.5)),
    "phi3": lambda: _from(Phi3Config(**SIZES, rope_scaling=None)),
    # its blocks return tuples
    "falcon": lambda: _from(
        FalconConfig(**{k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")})
    ),
}


def _tokens(samples: int = 5, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 60, (samples, length), generator=torch.Generator().manual_seed(1))


def _last_hidden(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """What the last block gives in a plain forward pass, before the final norm."""
    kept: list[torch.Tensor] = []
    block = decoder_blocks(model)[-1][1]
    handle = block.register_forward_hook(lambda _m, _a, output: kept.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_walking_gives_the_hidden_states_of_a_plain_forward_pass(family: str) -> None:
    model, tokens = FAMILIES[family](), _tokens()
    expected = _last_hidden(model, tokens)
    hidden = torch.empty(0)
    for block in walk(model, tokens, device="cpu", batch_size=2):
        block.advance()
        hidden = torch.cat(block.hidden_states)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    # the model is as it was
    torch.testing.assert_close(_last_hidden(model, tokens), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_the_gram_of_its_inputs_in_a_plain_forward_pass(family: str) -> None:
    model, tokens = FAMILIES[family](), _tokens()
    names = [target.name for target in find_targets(model)]
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: inputs.__setitem__(name, args[0]))
        for name in names
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    seen = 0
    for block in walk(model, tokens, device="cpu", batch_size=2):
        own = [name for name in names if name.startswith(f"{block.name}.")]
        for name, gram in block.grams(own, dtype=torch.float64).items():
            rows = inputs[name].reshape(-1, inputs[name].shape[-1]).double()
            torch.testing.assert_close(gram.matrix, rows.T @ rows, rtol=1e-4, atol=1e-4)
            seen += 1
    assert seen == len(names)


def test_layers_with_one_input_share_one_gram_and_others_do_not() -> None:
    block = next(walk(tiny_llama(), _tokens(), device="cpu", batch_size=2))
    names = [
        f"{block.name}.{layer}" for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    ]
    q, k, v, o = block.grams(names).values()
    assert q is k
    assert q is v
    assert q is not o
    assert q.matrix.dtype == torch.float32
    asked_late = block.grams([names[2]])[names[2]]
    torch.testing.assert_close(asked_late.matrix, q.matrix)


def test_the_next_block_sees_what_was_changed_in_this_ones_turn() -> None:
    model, tokens = tiny_llama(), _tokens()
    changed = tiny_llama()
    with torch.no_grad():
        for _, block in decoder_blocks(changed):
            block.get_submodule("mlp.down_proj").weight.mul_(0.5)
    hidden = torch.empty(0)
    for block in walk(model, tokens, device="cpu", batch_size=3):
        block.grams([f"{block.name}.mlp.down_proj"])
        old = block.module.get_submodule("mlp.down_proj")
        new = nn.Linear(old.in_features, old.out_features, bias=False)
        new.weight = nn.Parameter(old.weight.detach() * 0.5)
        block.module.get_submodule("mlp").down_proj = new
        block.advance()
        hidden = torch.cat(block.hidden_states)
    torch.testing.assert_close(hidden, _last_hidden(changed, tokens), rtol=1e-5, atol=1e-5)


def test_the_last_block_is_not_run_for_nothing() -> None:
    model = tiny_llama()
    runs = [0, 0, 0]
    for index, (_, module) in enumerate(decoder_blocks(model)):
        module.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    for _ in walk(model, _tokens(4), device="cpu", batch_size=2):
        pass
    assert runs == [2, 2, 0]


def test_only_the_block_of_the_turn_is_on_the_compute_device() -> None:
    model = tiny_llama().to(torch.bfloat16)
    # float32 marks the compute side here, as "cuda" would: a walk in float32 casts the block of its turn only
    for block in walk(model, _tokens(), device="cpu", batch_size=2):
        formats = [next(module.parameters()).dtype for _, module in decoder_blocks(model)]
        assert [dtype == torch.float32 for dtype in formats] == [index == block.index for index in range(3)]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_float32_walk_over_bfloat16_weights_computes_in_float32_and_leaves_the_weights_alone() -> None:
    model, tokens = tiny_llama(), _tokens()
    for parameter in model.parameters():  # as a checkpoint is loaded: model.to() would also cast the rotary frequencies
        parameter.data = parameter.data.to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact = tiny_llama()
    exact.load_state_dict({name: value.float() for name, value in before.items()})
    hidden = torch.empty(0)
    for block in walk(model, tokens, device="cpu", batch_size=2):
        block.advance()
        hidden = torch.cat(block.hidden_states)
    torch.testing.assert_close(hidden, _last_hidden(exact, tokens), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_bfloat16_walk_stays_near_float32(weights: torch.dtype) -> None:
    model, tokens = tiny_llama(), _tokens()
    expected = _last_hidden(model, tokens)
    hidden = torch.empty(0)
    for block in walk(model.to(weights), tokens, device="cpu", batch_size=2, dtype=torch.bfloat16):
        gram = block.grams([f"{block.name}.mlp.down_proj"])[f"{block.name}.mlp.down_proj"]
        assert gram.matrix.dtype == torch.float32
        block.advance()
        hidden = torch.cat(block.hidden_states)
    assert hidden.dtype == torch.bfloat16
    assert (hidden.float() - expected).norm() / expected.norm() < 0.02


def test_leaving_a_walk_early_restores_the_model() -> None:
    model = tiny_llama().to(torch.bfloat16).train()
    steps = walk(model, _tokens(), device="cpu", batch_size=2)
    next(steps)
    steps.close()
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_layer_of_another_block_or_one_that_never_runs_is_an_error() -> None:
    model = tiny_llama()
    model.model.layers[0].spare = nn.Linear(4, 4)
    block = next(walk(model, _tokens(), device="cpu", batch_size=2))
    with pytest.raises(ModelError, match="not in block"):
        block.grams(["model.layers.1.mlp.up_proj"])
    with pytest.raises(ModelError, match="never reached"):
        block.grams(["model.layers.0.spare"])
