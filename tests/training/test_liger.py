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
from qwha_cli.kernels import wide_linear
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize_span
from qwha_cli.models import liger
from qwha_cli.models.liger import FusedHead, apply_to_layers, choose_kernels, fused_head
from qwha_cli.models.token_loss import count_labelled, summed_loss, token_losses
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quantizers.vocabulary import quantize_words
from support.quantized import gaussian, quantize_words_of
from support.tiny_model import tiny_llama, tiny_qwen2

CPU = torch.device("cpu")
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not (HAS_LIGER and torch.cuda.is_available()), reason="needs a CUDA device and liger-kernel")


class PlainHead(FusedHead):
    """Computes after the model what the head would have computed in it."""

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(hidden)
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


BUILDS = [tiny_llama, tiny_qwen2, lambda: quantize_words_of(tiny_llama()), lambda: quantize_words_of(tiny_qwen2())]


@pytest.mark.parametrize("build", BUILDS)
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


def quantized_head(words: int, width: int, *, bias: bool, device: str = "cpu") -> QuantizedLinear:
    weight = gaussian(words, width, std=1.0)
    packed = quantize_words(weight, group_size=16, name="head", device=CPU)
    return QuantizedLinear.from_packed(packed, gaussian(1, words)[0] if bias else None).to(device)


def exact_loss(head: QuantizedLinear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and its gradient with the whole head in float64."""
    exact = hidden.detach().double().requires_grad_()
    bias = None if head.bias is None else head.bias.double()
    logits = torch.nn.functional.linear(exact, head.dense(torch.float64), bias)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    loss.backward()
    return loss.detach(), exact.grad


def some_tokens(tokens: int, width: int, words: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    hidden = gaussian(tokens, width, seed=1, std=0.3).to(device).requires_grad_()
    targets = torch.randint(0, words, (tokens,), generator=torch.Generator().manual_seed(2))
    targets[::7] = -100
    return hidden, targets.to(device)


def in_place(logits: Tensor, targets: Tensor, losses: Tensor, *, gradients: bool) -> None:
    """What Liger's kernel does, on any device."""
    scored = targets != -100
    losses.copy_(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    if gradients:
        slopes = logits.softmax(-1) - torch.nn.functional.one_hot(targets.clamp_min(0), logits.shape[1])
        logits.copy_(slopes * scored[:, None])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_the_loss_over_a_head_in_codes_is_that_of_its_dense_weight(
    bias: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liger, "_cross_entropy_in_place", in_place)
    monkeypatch.setattr(wide_linear, "_AT_ONCE", 96)
    largest: list[int] = []

    def span(codes: Codes, start: int, stop: int, *args: object, **kwargs: object) -> Tensor:
        found = dequantize_span(codes, start, stop, *args, **kwargs)
        largest.append(len(found))
        return found

    monkeypatch.setattr(wide_linear, "dequantize_span", span)
    head = quantized_head(1003, 80, bias=bias)
    head.keep_dense = kept
    hidden, targets = some_tokens(700, 80, 1003)
    loss = FusedHead(head).summed_loss(hidden, targets)
    (loss / 3).backward()
    expected, gradient = exact_loss(head, hidden, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(3 * hidden.grad.double(), gradient, rtol=1e-4, atol=1e-5)
    assert largest == [] if kept else max(largest) == 96
    with torch.no_grad():
        torch.testing.assert_close(FusedHead(head).summed_loss(hidden, targets), loss.detach())


@pytest.mark.gpu
@needs_liger
@pytest.mark.parametrize("tokens", [1, 700])
def test_a_head_in_codes_gives_its_loss_on_a_gpu_also_as_a_graph(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_linear, "_AT_ONCE", 96)
    head = quantized_head(1003, 96, bias=False, device="cuda")
    hidden, targets = some_tokens(tokens, 96, 1003, "cuda")
    expected, gradient = exact_loss(head, hidden, targets)
    fused = FusedHead(head)
    for _ in range(2):
        fused.summed_loss(hidden, targets).backward()
    torch.cuda.synchronize()
    hidden.grad = torch.zeros_like(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fused.summed_loss(hidden, targets)
        loss.backward()
    hidden.grad.zero_()
    graph.replay()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=1e-2, atol=1e-3)


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
