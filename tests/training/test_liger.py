"""Whose kernels a step uses: chosen with a reason, the head given back, and the loss without logits the loss of the logits."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from qwha_cli.data.collate import pad_batch
from qwha_cli.data.tokenize import Encoded
from qwha_cli.errors import UsageError
from qwha_cli.models.liger import FusedHead, apply_to_layers, choose_kernels, fused_head
from qwha_cli.models.token_loss import count_labelled, summed_loss, token_losses
from support.tiny_model import tiny_llama, tiny_qwen2

CPU = torch.device("cpu")
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not (HAS_LIGER and torch.cuda.is_available()), reason="needs a CUDA device and liger-kernel")


class PlainHead(FusedHead):
    """Computes after the model what the head would have computed in it."""

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def batch(device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, answer in ((5, 3), (1, 9), (0, 4)):
        ids = torch.randint(0, 256, (prompt + answer,), generator=generator).tolist()
        rows.append(Encoded(input_ids=ids, labels=[-100] * prompt + ids[prompt:]))
    return {name: tensor.to(device) for name, tensor in pad_batch(rows, pad_id=256).items()}


def test_a_cpu_gets_transformers_own_layers_and_is_told_why() -> None:
    choice = choose_kernels("auto", model=tiny_llama(), device=CPU)
    assert not choice.layers
    assert not choice.loss
    assert "CUDA" in choice.reason


def test_liger_where_it_cannot_be_had_is_refused() -> None:
    with pytest.raises(UsageError, match="CUDA"):
        choose_kernels("liger", model=tiny_llama(), device=CPU)


def test_what_the_recipe_asks_for_is_done() -> None:
    assert "as the recipe asks" in choose_kernels("torch", model=tiny_llama(), device=CPU).reason


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("peft", [False, True])
def test_without_logits_the_loss_and_gradients_are_those_with_them(
    build: type, peft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwha_cli.models.liger.FusedHead", PlainHead)
    model = base = build()
    if peft:
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    weight = model.get_parameter(next(name for name, p in model.named_parameters() if p.requires_grad and "q_proj" in name))
    own = base.get_output_embeddings()
    expected = token_losses(model, batch()).losses.sum()
    expected.backward()
    gradient = weight.grad.clone()
    model.zero_grad()
    with fused_head(base) as head:
        found = summed_loss(model, batch(), head=head)
        found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)
    assert base.get_output_embeddings() is own
    assert summed_loss(model, batch(), head=None) == expected


def test_the_head_comes_back_after_an_error() -> None:
    model = tiny_llama()
    own = model.get_output_embeddings()
    with pytest.raises(RuntimeError, match="stop"), fused_head(model):
        raise RuntimeError("stop")
    assert model.get_output_embeddings() is own


@pytest.mark.gpu
@needs_liger
def test_a_head_that_is_trained_keeps_its_logits() -> None:
    model = tiny_llama()
    assert "trains its head" in choose_kernels("auto", model=model, device=torch.device("cuda")).reason
    model.get_output_embeddings().requires_grad_(False)
    assert choose_kernels("auto", model=model, device=torch.device("cuda")).loss


@pytest.mark.gpu
@needs_liger
@pytest.mark.parametrize("tokens", [1, 255, 700])
def test_the_loss_without_logits_is_that_of_float64_logits(tokens: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(96, 1003, bias=True).cuda().requires_grad_(False)
    hidden = torch.randn(tokens, 96, device="cuda", requires_grad=True)
    targets = torch.randint(0, 1003, (tokens,), device="cuda")
    targets[::7] = -100
    loss = FusedHead(head).summed_loss(hidden, targets)
    (loss / 3).backward()
    exact = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(exact, head.weight.double(), head.bias.double())
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    (expected / 3).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@needs_liger
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2])
def test_liger_computes_the_same_loss_and_gradients(build: type) -> None:
    plain, fast = build().cuda(), build().cuda()
    fast.get_output_embeddings().requires_grad_(False)
    choice = choose_kernels("auto", model=fast, device=torch.device("cuda"))
    assert choice.layers
    assert choice.loss
    expected = token_losses(plain, batch("cuda")).losses.sum()
    expected.backward()
    apply_to_layers(fast)
    with fused_head(fast) as head:
        found = summed_loss(fast, batch("cuda"), head=head)
        found.backward()
    assert count_labelled(batch()["labels"]) == 15
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        torch.testing.assert_close(fast.get_parameter(name).grad, plain.get_parameter(name).grad, rtol=1e-2, atol=1e-3)
