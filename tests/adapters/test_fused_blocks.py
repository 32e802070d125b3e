"""Blocks whose norms and activations are made with their transforms compute what the blocks of the architecture compute."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from qwha_cli.adapters.fused_blocks import choose_fused_blocks, fused_blocks
from qwha_cli.adapters.keep import set_keep
from qwha_cli.adapters.peft_bridge import register
from qwha_cli.adapters.spectral.config import SpectralConfig
from qwha_cli.errors import KernelError
from qwha_cli.kernels import spectral_linear
from qwha_cli.kernels.shared_wht import stand_in
from support.adapted import fill, quantize_model
from support.tiny_model import SHAPE, tiny_llama, tiny_qwen2

CPU = torch.device("cpu")


def tiny_mistral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SHAPE, head_dim=12)).eval()


def tiny_qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=12)).eval()


BUILDS = [tiny_llama, tiny_qwen2, tiny_mistral, tiny_qwen3]


def adapted(build: Callable[[], PreTrainedModel], basis: str = "hadamard", **shape: object) -> PeftModel:
    model = build(**shape)
    for norm in (module for module in model.modules() if type(module).__name__.endswith("RMSNorm")):
        # transformers begins with ones, which hide a weight that is left out
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    register()
    peft_model = get_peft_model(quantize_model(model, basis), SpectralConfig(rank=4))
    fill(peft_model)
    return peft_model


def run(
    model: PeftModel, device: str = "cpu", dtype: torch.dtype | None = None, logits: bool = False
) -> tuple[Tensor, list[Tensor]]:
    ids = torch.arange(48, device=device).view(2, 24) * 5 % 250
    model.zero_grad()
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    return (found.logits.float() if logits else found.loss).detach(), [
        p.grad.clone() for p in model.parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_architecture(build: Callable[[], PreTrainedModel], checkpointing: bool) -> None:
    model = adapted(build).double().train()
    if checkpointing:
        set_keep(model, "block")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients = run(model)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    with fused_blocks(model.get_base_model()):
        fused, found = run(model)
    # float32 values under float64 activations, in another order of sums
    torch.testing.assert_close(fused, loss, rtol=1e-6, atol=0)
    for one, two in zip(gradients, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    again, _ = run(model)
    assert torch.equal(again, loss)


def test_no_norm_and_no_activation_runs_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama)
    layer = model.get_base_model().model.layers[0]
    for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp.act_fn):
        module.register_forward_hook(lambda *_: pytest.fail("a module ran that is done with the transform"))
    with fused_blocks(model.get_base_model()):
        assert torch.isfinite(run(model)[0])


def test_without_adapters_a_block_is_its_own() -> None:
    model = adapted(tiny_llama)
    ids = torch.arange(8)[None]
    with torch.no_grad(), model.disable_adapter():
        expected = model(ids).logits
        with fused_blocks(model.get_base_model()):
            assert torch.equal(model(ids).logits, expected)
    with torch.inference_mode():
        merged = model.merge_and_unload()
        expected = merged(ids).logits
        with fused_blocks(merged):
            assert torch.equal(merged(ids).logits, expected)


def test_an_activation_that_does_not_pay_is_made_by_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama)
    expected, _ = run(model)
    ran: list[object] = []
    model.get_base_model().model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: ran.append(1))
    monkeypatch.setattr("qwha_cli.adapters.fused_blocks.gate_pays", lambda size: False)
    with fused_blocks(model.get_base_model()):
        torch.testing.assert_close(run(model)[0], expected, rtol=1e-5, atol=1e-5)
    assert ran


@pytest.mark.parametrize("keep", ["memory", "block"])
def test_checkpointing_computes_blocks_again_and_keeps_nothing_dense(monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    model = adapted(tiny_llama).train()
    set_keep(model, keep)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    base = model.get_base_model()
    calls: list[int] = []
    for index, layer in enumerate(base.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    built: list[weakref.ref[Tensor]] = []
    build = spectral_linear.build_weight

    def remembered(*args: object) -> Tensor:
        weight = build(*args)
        built.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(spectral_linear, "build_weight", remembered)
    ids = torch.arange(24)[None]
    with fused_blocks(base):
        loss = model(input_ids=ids, labels=ids).loss
        assert calls == [0, 1, 2]
        assert len(built) == 21
        assert not any(weight() is not None for weight in built)
        loss.backward()
    assert calls == [0, 1, 2, 2, 1, 0]


def test_what_a_model_can_be_asked_for_besides_is_as_before() -> None:
    model = adapted(tiny_llama)
    base = model.get_base_model()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
        words = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        with fused_blocks(base):
            found = model(ids, output_hidden_states=True)
            assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), words)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for one, two in zip(expected.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_a_switch_is_undone_in_turn_and_after_an_error() -> None:
    model = adapted(tiny_llama)
    block = model.get_base_model().model.layers[0]
    own = type(block)
    with fused_blocks(model.get_base_model()):
        inner = type(block)
        assert issubclass(inner, own)
        with fused_blocks(model.get_base_model()):
            assert type(block) is not inner
        assert type(block) is inner
    assert type(block) is own
    with pytest.raises(ZeroDivisionError), fused_blocks(model.get_base_model()):
        raise ZeroDivisionError
    assert type(block) is own


def test_why_not_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(model: torch.nn.Module, wanted: bool = True, dtype: torch.dtype = torch.bfloat16) -> str:
        choice = choose_fused_blocks(model, wanted=wanted, device=torch.device("cuda"), dtype=dtype)
        assert not choice.fused
        return choice.reason

    model = adapted(tiny_llama).get_base_model()
    assert "not on cpu" in choose_fused_blocks(model, wanted=True, device=CPU, dtype=torch.bfloat16).reason
    monkeypatch.setattr("qwha_cli.kernels.backend._lacking", lambda *_: None)
    assert choose_fused_blocks(model, wanted=True, device=torch.device("cuda"), dtype=torch.bfloat16).fused
    assert "as the recipe asks" in reason(model, wanted=False)
    assert "float32" in reason(model, dtype=torch.float32)
    assert "Hadamard basis" in reason(adapted(tiny_llama, "weight").get_base_model())
    assert "Hadamard basis" in reason(tiny_llama())
    model.config.model_type = "unheard-of"
    assert "not known" in reason(model)


def test_a_stand_in_is_not_read() -> None:
    z = torch.randn(2, 8, requires_grad=True)
    x = stand_in(z * 1, torch.float32)
    assert x.requires_grad
    assert x.isnan().all()
    with pytest.raises(KernelError, match="read by something else"):
        x.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_errors_are_no_larger(build: Callable[[], PreTrainedModel], checkpointing: bool) -> None:
    shape = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 48} if build in (tiny_llama, tiny_qwen2) else {}
    model = adapted(build, **shape).to("cuda").train()
    if checkpointing:
        set_keep(model, "block")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    exact, exact_gradients = run(model, "cuda", logits=True)
    apart, gradients = run(model, "cuda", torch.bfloat16, logits=True)
    with fused_blocks(model.get_base_model()):
        fused, found = run(model, "cuda", torch.bfloat16, logits=True)
    assert (fused - exact).norm() <= 1.3 * (apart - exact).norm()

    def error(gradients: list[Tensor]) -> Tensor:
        # each layer's by its own size, all together: one layer's error is a matter of luck
        pairs = zip(gradients, exact_gradients, strict=True)
        return torch.stack([(one - true).norm() / true.norm() for one, true in pairs]).mean()

    assert error(found) <= 1.3 * error(gradients)
