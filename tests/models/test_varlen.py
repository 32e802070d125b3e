"""Attention over flat rows: the losses and gradients of padded and of packed batches, without a mask and without waiting."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from qwha_cli.data.collate import pack, packed_batch, pad_batch
from qwha_cli.data.flatten import FlatShape, equal_length, flat_batch
from qwha_cli.data.tokenize import IGNORED, Encoded
from qwha_cli.errors import UsageError
from qwha_cli.models.liger import FusedHead, fused_head
from qwha_cli.models.token_loss import summed_loss, token_losses
from qwha_cli.models.varlen import (
    VARLEN,
    choose_attention,
    device_obstacle,
    model_obstacle,
    varlen_attention,
    varlen_reference,
    varlen_torch,
)
from support.quantized import quantize_words_of
from support.tiny_model import SHAPE, VOCABULARY, tiny_llama, tiny_qwen2

CPU = torch.device("cpu")
LONGEST = 24
FILLED = FlatShape(longest=LONGEST, tokens=32, places=16, sequences=8)
WINDOW = 5
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tiny_mistral(**overrides: object) -> PreTrainedModel:
    """Every layer sees a window."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**{**SHAPE, "head_dim": 12, "sliding_window": WINDOW, **overrides})).eval()


def tiny_gemma3(**overrides: object) -> PreTrainedModel:
    """Windows in some layers only, and another scale than head_dim ** -0.5."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {**SHAPE, "head_dim": 16, "sliding_window": WINDOW, "layer_types": kinds, "query_pre_attn_scalar": 10, **overrides}
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape)).eval()


BUILDS = [tiny_llama, tiny_qwen2, tiny_mistral, tiny_gemma3]


class PlainHead(FusedHead):
    """Computes after the model what the head would have computed in it."""

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(hidden).float(), targets, reduction="sum")


class Waiting(TorchDispatchMode):
    """Refuses what would wait for a GPU: numbers read by Python, and shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in self.WAITS):
            raise AssertionError(f"{func} waits for the device")
        if "index.Tensor" in str(func) and any(one is not None and one.dtype == torch.bool for one in args[1]):
            raise AssertionError("a mask as index waits for the device")
        return func(*args, **(kwargs or {}))


def examples(seed: int = 0, *, count: int = 6) -> list[Encoded]:
    chance = random.Random(seed)
    found = []
    for length in [1, LONGEST, *(chance.randint(2, LONGEST) for _ in range(count - 2))]:
        ids = [chance.randrange(256) for _ in range(length)]
        prompt = chance.randrange(length)
        found.append(Encoded(ids, [IGNORED] * prompt + ids[prompt:]))
    return found


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    value = loss()
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], *, rtol: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=max(rtol, 1e-6), atol=0)  # the loss itself is float32
    assert found[1].keys() == expected[1].keys()
    assert len(found[1]) > 2
    for name, gradient in expected[1].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=rtol * largest, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_loss_and_gradients_are_those_of_padded_and_of_packed_batches(build: Any, dtype: torch.dtype, rtol: float) -> None:
    model, rows = build().to(dtype), examples()
    padded = pad_batch(rows, pad_id=256)
    packed = packed_batch(pack(rows, length=2 * LONGEST), pad_id=256)
    expected = gradients(model, lambda: summed_loss(model, padded, head=None))
    assert_same(gradients(model, lambda: summed_loss(model, packed, head=None)), expected, rtol=rtol)
    for shape in (FlatShape(longest=LONGEST), FILLED):
        flat = flat_batch(rows, pad_id=256, shape=shape)
        with varlen_attention(model, reference=True):
            found = gradients(model, lambda flat=flat: summed_loss(model, flat, head=None, longest=LONGEST))
        assert_same(found, expected, rtol=rtol)


@pytest.mark.parametrize("build", BUILDS)
def test_sequences_of_one_length_give_the_same_as_a_batch_of_them(build: Any) -> None:
    model = build().double()
    rows = [Encoded(list(range(start, start + LONGEST)), list(range(start, start + LONGEST))) for start in (0, 50, 100)]
    flat = flat_batch(rows, pad_id=256, shape=FlatShape(longest=LONGEST, tokens=LONGEST, sequences=8))
    assert equal_length(flat) == LONGEST
    expected = gradients(model, lambda: summed_loss(model, pad_batch(rows, pad_id=256), head=None))
    with varlen_attention(model, reference=True):
        found = gradients(model, lambda: summed_loss(model, flat, head=None, longest=LONGEST, equal=LONGEST))
    assert_same(found, expected, rtol=1e-6)
    assert equal_length(flat_batch(examples(), pad_id=256, shape=FILLED)) is None


def test_examples_of_packed_rows_are_kept_apart() -> None:
    model, rows = tiny_mistral().double(), examples(1)
    flat = flat_batch(pack(rows, length=2 * LONGEST), pad_id=256, shape=FILLED)
    expected = gradients(model, lambda: summed_loss(model, pad_batch(rows, pad_id=256), head=None))
    with varlen_attention(model, reference=True):
        found = gradients(model, lambda: summed_loss(model, flat, head=None, longest=LONGEST))
    assert_same(found, expected, rtol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_logits_under_peft_and_with_activations_recomputed_the_gradients_are_the_same(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwha_cli.models.liger.FusedHead", PlainHead)
    base, rows = tiny_llama(), examples()
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).train()
    expected = gradients(model, lambda: summed_loss(model, pad_batch(rows, pad_id=256), head=None))
    flat = flat_batch(rows, pad_id=256, shape=FILLED)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with varlen_attention(base, reference=True), fused_head(base) as head:
        found = gradients(model, lambda: summed_loss(model, flat, head=head, longest=LONGEST))
    assert_same(found, expected, rtol=1e-4)


def test_each_token_has_its_loss_and_its_sequence() -> None:
    model, rows = tiny_llama(), examples()
    expected = token_losses(model, pad_batch(rows, pad_id=256))
    with varlen_attention(model, reference=True):
        for narrow in (True, False):
            found = token_losses(model, flat_batch(rows, pad_id=256, shape=FILLED), narrow=narrow, longest=LONGEST)
            torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=1e-5)
            assert torch.equal(found.rows, expected.rows)


IN_CODES = [
    lambda: quantize_words_of(tiny_llama()),
    lambda: quantize_words_of(tiny_qwen2()),
    lambda: quantize_words_of(tiny_gemma3()),
]


@pytest.mark.parametrize("build", [*BUILDS, *IN_CODES])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_makes_no_mask_and_reads_nothing_from_the_device(build: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwha_cli.models.liger.FusedHead", PlainHead)
    model = build()
    flat = flat_batch(examples(), pad_id=256, shape=FILLED)
    masks: list[object] = []
    for layer in model.modules():
        if hasattr(layer, "is_causal"):
            layer.register_forward_pre_hook(lambda _, args, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
    with varlen_attention(model, reference=True), fused_head(model) as head, Waiting():
        if fused:
            summed_loss(model, flat, head=head, longest=LONGEST).backward()
        else:
            model.set_output_embeddings(nn.Linear(SHAPE["hidden_size"], VOCABULARY, bias=False))
            summed_loss(model, flat, head=None, longest=LONGEST).backward()
    assert masks == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_in_codes_reads_nothing_from_the_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwha_cli.models.liger._cross_entropy_in_place", lambda *_, **__: None)
    monkeypatch.setattr("qwha_cli.kernels.wide_linear._AT_ONCE", 64)
    monkeypatch.setattr("qwha_cli.kernels.wide_linear._WIDE", 64)
    model = quantize_words_of(tiny_qwen2()).to(dtype)
    hidden = torch.randn(5, 48).to(dtype).requires_grad_()
    with Waiting():
        FusedHead(model.lm_head).summed_loss(hidden, torch.zeros(5, dtype=torch.long)).backward()
        model.lm_head(hidden).sum().backward()
        model.model.embed_tokens(torch.arange(6))


def test_a_padded_step_does_read_from_the_device() -> None:
    model = tiny_llama()
    with Waiting(), pytest.raises(AssertionError, match="waits for the device"):
        summed_loss(model, pad_batch(examples(), pad_id=256), head=None)
    packed = packed_batch(pack(examples(), length=2 * LONGEST), pad_id=256)
    with Waiting(), pytest.raises(AssertionError, match="waits for the device"):
        model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False)


def test_autocast_computes_attention_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.update((q.dtype, k.dtype, v.dtype))
        return varlen_reference(q, k, v, *args, **kwargs)

    monkeypatch.setattr("qwha_cli.models.varlen.varlen_torch", spy)
    model = tiny_llama()
    flat = flat_batch(examples(), pad_id=256, shape=FILLED)
    with varlen_attention(model), torch.autocast("cpu", torch.bfloat16):
        summed_loss(model, flat, head=None, longest=LONGEST)
    assert seen == {torch.bfloat16}


def test_the_model_is_switched_back_exactly_even_after_an_error() -> None:
    for implementation in ("eager", "sdpa"):
        model = tiny_llama()
        model.set_attn_implementation(implementation)
        with varlen_attention(model):
            assert model.config._attn_implementation == VARLEN
            assert model.model.layers[1].self_attn.config._attn_implementation == VARLEN
        assert model.config._attn_implementation == implementation
        with pytest.raises(RuntimeError, match="stop"), varlen_attention(model):
            raise RuntimeError("stop")
        assert model.config._attn_implementation == implementation


def test_what_the_kernel_cannot_do_is_refused_and_never_ignored() -> None:
    flat = flat_batch(examples(), pad_id=256, shape=FILLED)
    model = tiny_llama()
    with varlen_attention(model), pytest.raises(UsageError, match="16 bits on CUDA"):
        summed_loss(model, flat, head=None, longest=LONGEST)
    with varlen_attention(model, reference=True), pytest.raises(UsageError, match="did not reach the attention"):
        model(input_ids=flat["input_ids"])
    dropping = tiny_llama(attention_dropout=0.1).train()
    with varlen_attention(dropping, reference=True), pytest.raises(UsageError, match="wants dropout"):
        summed_loss(dropping, flat, head=None, longest=LONGEST)
    sinks = tiny_gpt_oss()
    with varlen_attention(sinks, reference=True), pytest.raises(UsageError, match="wants s_aux"):
        summed_loss(sinks, flat, head=None, longest=LONGEST)


def tiny_gpt_oss() -> PreTrainedModel:
    return GptOssForCausalLM(GptOssConfig(**{**SHAPE, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1})).eval()


def tiny_gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**{**SHAPE, "head_dim": 16})).eval()


def test_a_cpu_gets_padded_batches_and_is_told_why() -> None:
    choice = choose_attention("auto", model=tiny_llama(), device=CPU, dtype=torch.bfloat16)
    assert not choice.varlen
    assert "CUDA" in choice.reason
    with pytest.raises(UsageError, match="CUDA"):
        choose_attention("varlen", model=tiny_llama(), device=CPU, dtype=torch.bfloat16)
    assert "as the recipe asks" in choose_attention("padded", model=tiny_llama(), device=CPU, dtype=torch.bfloat16).reason


@pytest.mark.parametrize("build", BUILDS)
def test_the_common_architectures_can_be_laid_flat(build: Any) -> None:
    assert model_obstacle(build(head_dim=64)) is None


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: nn.Linear(2, 2), "does not hand the sequences' lengths on"),
        (tiny_gemma2, "caps attention scores"),
        (tiny_gpt_oss, "attention sinks"),
        (lambda: tiny_llama(attention_dropout=0.1), "drops attention"),
        (lambda: tiny_llama(head_dim=12), "heads have 12 numbers"),
        (lambda: tiny_llama(head_dim=264), "heads have 264 numbers"),
        (
            lambda: with_config(tiny_llama(), layer_types=["linear_attention", "full_attention"]),
            r"kept apart \(linear_attention\)",
        ),
        (lambda: tiny_gemma3(use_bidirectional_attention=True), "not causal"),
    ],
)
def test_what_an_architecture_lacks_is_said(build: Any, why: str) -> None:
    obstacle = model_obstacle(build())
    assert obstacle is not None
    assert re.search(why, obstacle), obstacle


def with_config(model: PreTrainedModel, **attributes: object) -> PreTrainedModel:
    for name, value in attributes.items():
        setattr(model.config, name, value)
    return model


@needs_cuda
@pytest.mark.gpu
def test_a_gpu_is_chosen_in_16_bits_only() -> None:
    cuda = torch.device("cuda")
    assert device_obstacle(cuda, dtype=torch.bfloat16) is None
    assert "not in float32" in (device_obstacle(cuda, dtype=torch.float32) or "")
    assert choose_attention("auto", model=tiny_llama(head_dim=64), device=cuda, dtype=torch.bfloat16).varlen


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads_kv", [2, 6])
@pytest.mark.parametrize("window", [None, 33])
def test_torchs_kernel_is_as_near_the_reference_as_16_bits_are(head_dim: int, heads_kv: int, window: int | None) -> None:
    lengths = [1, 200, 37, 128, 3, 61, 0, 0]
    total = sum(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).cuda()
    behind = torch.arange(total, device="cuda")[:, None] - torch.arange(total, device="cuda")
    mask = (sequence[:, None] == sequence) & (behind >= 0) & (behind < (window or total))
    generator = torch.Generator().manual_seed(0)

    def random_heads(heads: int) -> Tensor:
        return torch.randn(heads, total, head_dim, generator=generator).to("cuda", torch.bfloat16).transpose(0, 1)

    inputs = [random_heads(6), random_heads(heads_kv), random_heads(heads_kv)]
    outer = random_heads(6)

    def masked(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        k, v = (one.repeat_interleave(6 // heads_kv, dim=1) for one in (k, v))
        given = (one.transpose(0, 1).unsqueeze(0) for one in (q, k, v))
        return nn.functional.scaled_dot_product_attention(*given, attn_mask=mask, scale=0.1).squeeze(0).transpose(0, 1)

    def run(kernel: Any, dtype: torch.dtype, longest: int) -> list[Tensor]:
        given = [one.to(dtype).detach().requires_grad_() for one in inputs]
        out = kernel(*given, ends, longest=longest, scale=0.1, window=window)
        return [out.detach().float(), *(g.float() for g in torch.autograd.grad(out, given, outer.to(dtype)))]

    exact = run(varlen_reference, torch.float32, 200)
    plain = run(masked, torch.bfloat16, 200)
    for longest in (200, 1024):  # as long as the longest, and longer than the whole row
        for found, rounded, truth in zip(run(varlen_torch, torch.bfloat16, longest), plain, exact, strict=True):
            assert float((found - truth).norm()) <= 2 * float((rounded - truth).norm())


@needs_cuda
@pytest.mark.gpu
def test_a_step_is_recorded_as_a_cuda_graph_and_replayed_on_another_batch() -> None:
    model = tiny_llama(head_dim=64).to("cuda", torch.bfloat16)
    weight = model.model.layers[0].self_attn.q_proj.weight
    batches = [
        {name: tensor.cuda() for name, tensor in flat_batch(examples(seed), pad_id=256, shape=shape).items()}
        for shape in [FlatShape(longest=LONGEST, tokens=256, places=256, sequences=32)]
        for seed in (0, 1)
    ]
    assert [t.shape for t in batches[0].values()] == [t.shape for t in batches[1].values()]
    held = {name: tensor.clone() for name, tensor in batches[0].items()}

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        loss = summed_loss(model, held, head=None, longest=LONGEST)
        loss.backward()
        return loss.detach()

    with varlen_attention(model):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = step()
        for batch in batches:
            for name, tensor in batch.items():
                held[name].copy_(tensor)
            expected, gradient = step(), weight.grad.clone()
            graph.replay()
            torch.testing.assert_close(recorded, expected, rtol=1e-3, atol=0)
            torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=1e-2 * float(gradient.abs().max()))
