from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

from qwha_cli.errors import ModelError
from qwha_cli.models.targets import decoder_blocks, find_targets
from support.tiny_model import tiny_llama

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_all_linears_inside_the_blocks_are_targets_and_the_head_is_not() -> None:
    targets = find_targets(tiny_llama(), targets="all-linear", exclude=[])
    assert [target.projection for target in targets] == PROJECTIONS * 3
    assert [target.block for target in targets] == [0] * 7 + [1] * 7 + [2] * 7
    assert targets[7].name == "model.layers.1.self_attn.q_proj"


def test_names_select_by_whole_components_of_the_path() -> None:
    model = tiny_llama()
    assert {t.projection for t in find_targets(model, targets=["mlp.up_proj", "q_proj"])} == {"up_proj", "q_proj"}
    assert {t.block for t in find_targets(model, targets=["layers.1"])} == {1}
    left = find_targets(model, exclude=["self_attn", "model.layers.0"])
    assert len(left) == 6
    assert {t.projection for t in left} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("where", ["targets", "exclude"])
def test_an_unknown_name_is_an_error_that_names_the_nearest(where: str) -> None:
    names = {"targets": {"targets": ["down_pro"]}, "exclude": {"exclude": ["down_pro"]}}[where]
    with pytest.raises(ModelError, match=r"down_pro: .*did you mean 'down_proj'.*q_proj"):
        find_targets(tiny_llama(), **names)


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(ModelError, match="no layer is left"):
        find_targets(tiny_llama(), exclude=["mlp", "self_attn"])


def test_fused_projections_are_found() -> None:
    config = Phi3Config(
        vocab_size=32, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    targets = find_targets(AutoModelForCausalLM.from_config(config))
    assert {t.projection for t in targets} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_a_model_without_linears_is_refused_with_what_is_supported() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=24, n_layer=2, n_head=2))
    with pytest.raises(ModelError, match="no Linear") as caught:
        find_targets(model)
    assert "Llama" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="no list of equal decoder blocks"):
        decoder_blocks(nn.Linear(2, 2))


class _Packed(nn.Module):
    """Like a quantized or adapted layer: it replaces a linear and may hold one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_layer = inner


def test_a_replaced_layer_is_one_target_and_what_it_holds_is_none() -> None:
    model = tiny_llama()
    for _, block in decoder_blocks(model):
        block.mlp.up_proj = _Packed(block.mlp.up_proj)
    targets = find_targets(model, kinds=(_Packed, nn.Linear))
    assert [target.projection for target in targets] == PROJECTIONS * 3
    assert len(find_targets(model, kinds=(_Packed,))) == 3


def test_lists_inside_blocks_and_other_lists_are_not_taken_for_the_blocks() -> None:
    model = tiny_llama()
    for _, block in decoder_blocks(model):
        block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    model.model.norms = nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])
    assert [name for name, _ in decoder_blocks(model)] == [f"model.layers.{index}" for index in range(3)]


def test_blocks_of_a_peft_model_are_found() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    blocks = decoder_blocks(model)
    assert len(blocks) == 3
    assert all(model.get_submodule(name) is block for name, block in blocks)
    assert torch.is_tensor(next(blocks[0][1].parameters()))
