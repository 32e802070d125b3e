"""The loop on what it is for: spectral values over a 2-bit base, in both bases, resumed, saved, reloaded and scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from peft import PeftModel
from torch import nn

from qwha_cli.adapters.adapted_linear import adapted_layers
from qwha_cli.adapters.build import add_adapter, load_adapter, save_adapter
from qwha_cli.adapters.fp8 import advice, choose_fp8, fp8_products
from qwha_cli.adapters.keep import set_keep
from qwha_cli.adapters.spectral.config import Store
from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.data.example import prompt_and_response
from qwha_cli.data.tokenize import encode
from qwha_cli.errors import Interrupted, UsageError
from qwha_cli.evaluation.answers import answer_perplexity, exact_match
from qwha_cli.evaluation.harness import TaskRequest, run_tasks
from qwha_cli.kernels.fp8 import E4M3
from qwha_cli.kernels.low_rank import LowRank
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.spectral_linear import Keep
from qwha_cli.kernels.weight_fp8 import Fp8Weight
from qwha_cli.quant.checkpoint import load_base, save_base
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import Basis, QuantizerOptions
from qwha_cli.quant.swap import get_linear, replace
from qwha_cli.quantizers.rtn import quantize
from qwha_cli.training import loop
from qwha_cli.training.loop import train
from qwha_cli.training.metrics import StepMetrics
from qwha_cli.training.precision import PrecisionChoice
from qwha_cli.training.settings import TrainResult, TrainSettings
from support.tiny_model import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EXAMPLES = [prompt_and_response(f"What is {i} and 1?\n", f"The final answer is: {i + 1}", answer=str(i + 1)) for i in range(8)]
ENCODED = [encode(example, TOKENIZER) for example in EXAMPLES]


class Deaf:
    """A watcher that ignores everything."""

    def start(self, total_steps: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None: ...

    def validation(self, step: int, loss: float) -> None: ...

    def note(self, text: str) -> None: ...


def quantized(folder: Path, basis: Basis) -> Path:
    model = tiny_llama()
    options = QuantizerOptions(method="rtn", bits=2, group_size=16, symmetric=False, basis=basis)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    for name in names:
        packed = quantize(get_linear(model, name).weight.detach(), None, options=options, name=name)
        replace(model, name, QuantizedLinear.from_packed(packed))
    save_base(model, folder, tokenizer=TOKENIZER, format=options.format)
    return folder


def adapted(folder: Path, *, store: Store = "bfloat16") -> PeftModel:
    base = load_base(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    rows = {}
    for name, module in base.named_modules():
        if isinstance(module, QuantizedLinear):
            mask = torch.rand(module.out_features, module.in_features, generator=generator) < 0.1
            rows[name] = SparseRows.from_mask(torch.zeros(mask.shape), mask)
    return add_adapter(base, rank=4, scale=1.0, targets=list(rows), start=rows, store=store)


def adapted_low_rank(folder: Path) -> PeftModel:
    base = load_base(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    start = {
        name: LowRank(torch.randn(4, module.in_features, generator=generator) * 0.1, torch.zeros(module.out_features, 4))
        for name, module in base.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    return add_adapter(base, rank=4, scale=1.0, targets=list(start), start=start)


def fit(model: PeftModel, work: Path, *, stop_after: int | None = None, **settings: object) -> TrainResult:
    asked = iter(range(1, 1000))
    how = {"lr": 0.02, "pad_id": 256, "steps": 20, "batch_size": 4, "precision": "fp32", "save_every": 7} | settings
    return train(
        model,
        ENCODED,
        encoded_validation=[],
        settings=TrainSettings(**how),  # type: ignore[arg-type]
        work_dir=work,
        identity="test",
        progress=Deaf(),
        interrupted=lambda: next(asked) == stop_after,
    )


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
def test_trained_values_resume_bit_for_bit_and_are_worth_their_loss_after_reloading(tmp_path: Path, basis: Basis) -> None:
    base = quantized(tmp_path / "base", basis)
    straight = adapted(base)
    before = answer_perplexity(straight, TOKENIZER, EXAMPLES, max_length=512, batch_size=4)
    result = fit(straight, tmp_path / "straight")
    assert result.last_loss < 0.6 * result.first_loss
    assert all(name.split(".")[-2] == "qwha_values" for name in values(straight))
    assert all(tensor.dtype == torch.float32 for tensor in values(straight).values())

    broken = adapted(base)
    with pytest.raises(Interrupted):
        fit(broken, tmp_path / "broken", stop_after=10)
    resumed = adapted(base)
    assert fit(resumed, tmp_path / "broken").resumed_from == 10
    assert all(torch.equal(tensor, values(resumed)[name]) for name, tensor in values(straight).items())

    after = answer_perplexity(straight, TOKENIZER, EXAMPLES, max_length=512, batch_size=4)
    assert after.value < 0.5 * before.value
    save_adapter(straight, tmp_path / "adapter")
    reloaded = load_adapter(load_base(base, dtype=torch.float32), tmp_path / "adapter", trainable=True)
    assert all(torch.equal(tensor.bfloat16().float(), values(reloaded)[name]) for name, tensor in values(straight).items())
    rounded = answer_perplexity(reloaded, TOKENIZER, EXAMPLES, max_length=512, batch_size=4)
    assert rounded.value == pytest.approx(after.value, rel=0.01)


def test_with_float32_files_the_reloaded_adapter_scores_the_very_same(tmp_path: Path) -> None:
    base = quantized(tmp_path / "base", "hadamard")
    model = adapted(base, store="float32")
    fit(model, tmp_path / "work", steps=5)
    save_adapter(model, tmp_path / "adapter")
    reloaded = load_adapter(load_base(base, dtype=torch.float32), tmp_path / "adapter", trainable=False)
    scores = [answer_perplexity(m, TOKENIZER, EXAMPLES, max_length=512, batch_size=4) for m in (model, reloaded)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
def test_the_factors_of_a_lora_resume_bit_for_bit_and_are_worth_their_loss_after_reloading(tmp_path: Path, basis: Basis) -> None:
    base = quantized(tmp_path / "base", basis)
    straight = adapted_low_rank(base)
    result = fit(straight, tmp_path / "straight")
    assert result.last_loss < 0.6 * result.first_loss
    assert {name.split(".")[-3] for name in values(straight)} == {"lora_A", "lora_B"}
    assert all(tensor.dtype == torch.float32 for tensor in values(straight).values())

    broken = adapted_low_rank(base)
    with pytest.raises(Interrupted):
        fit(broken, tmp_path / "broken", stop_after=10)
    resumed = adapted_low_rank(base)
    assert fit(resumed, tmp_path / "broken").resumed_from == 10
    assert all(torch.equal(tensor, values(resumed)[name]) for name, tensor in values(straight).items())

    save_adapter(straight, tmp_path / "adapter")
    reloaded = load_adapter(load_base(base, dtype=torch.float32), tmp_path / "adapter", trainable=False)
    scores = [answer_perplexity(model, TOKENIZER, EXAMPLES, max_length=512, batch_size=4) for model in (straight, reloaded)]
    assert scores[0] == scores[1]


def test_memory_and_speed_settings_train_a_lora_to_the_same_factors(tmp_path: Path) -> None:
    base = quantized(tmp_path / "base", "hadamard")
    plain, recomputed = adapted_low_rank(base), adapted_low_rank(base)
    fit(plain, tmp_path / "a", steps=5)
    fit(recomputed, tmp_path / "b", steps=5, checkpointing=True, batch_size=2, accumulation=2)
    for name, tensor in values(plain).items():
        torch.testing.assert_close(values(recomputed)[name], tensor, rtol=1e-3, atol=1e-5)


def test_memory_and_speed_settings_train_the_same_values(tmp_path: Path) -> None:
    base = quantized(tmp_path / "base", "hadamard")
    plain, recomputed = adapted(base), adapted(base)
    fit(plain, tmp_path / "a", steps=5)
    fit(recomputed, tmp_path / "b", steps=5, checkpointing=True, batch_size=2, accumulation=2)
    for name, tensor in values(plain).items():
        torch.testing.assert_close(values(recomputed)[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [adapted, adapted_low_rank])
@pytest.mark.parametrize("basis", ["weight", "hadamard"])
def test_whatever_is_kept_of_dense_weights_trains_the_very_same_values(
    tmp_path: Path, basis: Basis, kind: Callable[[Path], PeftModel]
) -> None:
    base = quantized(tmp_path / "base", basis)
    found = []
    for keep in ("memory", "block", "speed"):
        model = kind(base)
        set_keep(model, keep)
        fit(model, tmp_path / keep, steps=3, checkpointing=True, accumulation=2)
        found.append(values(model))
    assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items() for other in found[1:])


def test_bf16_follows_the_float32_curve(tmp_path: Path) -> None:
    base = quantized(tmp_path / "base", "hadamard")
    full = fit(adapted(base), tmp_path / "a")
    half = fit(adapted(base), tmp_path / "b", precision="bf16")
    assert half.first_loss == pytest.approx(full.first_loss, rel=0.02)
    assert half.last_loss == pytest.approx(full.last_loss, rel=0.15)


def test_generation_and_lm_eval_run_on_the_adapted_quantized_model(tmp_path: Path) -> None:
    model = adapted(quantized(tmp_path / "base", "hadamard"))
    score, samples = exact_match(model, TOKENIZER, EXAMPLES, max_new_tokens=4, batch_size=4)
    assert (score.n, len(samples)) == (8, 8)
    rows = [{"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Sing to it.", "label": i % 2} for i in range(2)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = TaskRequest(name="piqa", shots=0, limit=None, data={"validation": str(tmp_path / "piqa.jsonl")})
    scores, _ = run_tasks(model, TOKENIZER, [request], batch_size=2, seed=0)
    assert {s.metric for s in scores} == {"acc", "acc_norm"}


def test_fp8_follows_the_float32_curve_resumes_bit_for_bit_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = quantized(tmp_path / "base", "hadamard")
    full = fit(adapted(base), tmp_path / "a")
    model = adapted(base)
    result = fit(model, tmp_path / "b", precision="fp8")
    assert result.precision == "fp8"
    assert any("8-bit products in 15 of 21 adapted layers" in note for note in result.notes)
    assert result.first_loss == pytest.approx(full.first_loss, rel=0.03)
    assert result.last_loss == pytest.approx(full.last_loss, rel=0.2)
    # it was another arithmetic, and is not any more
    assert result.last_loss != fit(adapted(base), tmp_path / "c", precision="bf16").last_loss
    assert not any(layer.fp8 for layer in adapted_layers(model).values())
    with pytest.raises(Interrupted):
        fit(adapted(base), tmp_path / "d", precision="fp8", stop_after=10)
    resumed = adapted(base)
    assert fit(resumed, tmp_path / "d", precision="fp8").resumed_from == 10
    assert all(torch.equal(tensor, values(resumed)[name]) for name, tensor in values(model).items())


@pytest.mark.parametrize("keep", ["block", "speed"])
def test_fp8_trains_the_very_same_values_whatever_is_kept_and_recomputed(tmp_path: Path, keep: Keep) -> None:
    base = quantized(tmp_path / "base", "hadamard")
    plain, other = adapted(base), adapted(base)
    fit(plain, tmp_path / "a", steps=3, precision="fp8")
    set_keep(other, keep)
    fit(other, tmp_path / "b", steps=3, precision="fp8", checkpointing=True)
    assert all(torch.equal(tensor, values(other)[name]) for name, tensor in values(plain).items())


@pytest.mark.parametrize(("kind", "basis"), [(adapted, "weight"), (adapted_low_rank, "hadamard")])
def test_fp8_without_a_layer_that_has_it_is_refused(tmp_path: Path, kind: Callable[[Path], PeftModel], basis: Basis) -> None:
    base = quantized(tmp_path / "base", basis)
    with pytest.raises(UsageError, match="no adapted layer has 8-bit products"):
        fit(kind(base), tmp_path / "a", precision="fp8")


def test_what_keep_speed_keeps_of_8_bit_weights_is_made_once_a_step_and_stays_where_it_is(tmp_path: Path) -> None:
    model = adapted(quantized(tmp_path / "base", "hadamard"))
    set_keep(model, "speed")
    model.train()
    fitting = choose_fp8(model, wanted=True)
    layer = cast(SpectralLinear, fitting.layers[0])
    x = torch.randn(5, layer.in_features, dtype=torch.bfloat16)
    with fp8_products(fitting):
        before = layer(x)
        kept = layer._kept(("default",), "wht", E4M3)
        assert isinstance(kept, Fp8Weight)
        assert len(layer._weights) == 1
        with torch.no_grad():
            layer.qwha_values["default"].add_(1.0)
        layer.renew_kept()
        again = layer._kept(("default",), "wht", E4M3)
        assert [a.data_ptr() for a in kept] == [b.data_ptr() for b in again]
        after = layer(x)
    assert not torch.equal(before, after)
    other = adapted(tmp_path / "base")
    plain = cast(SpectralLinear, choose_fp8(other, wanted=True).layers[0])
    with torch.no_grad():
        plain.qwha_values["default"].add_(1.0)
    plain.fp8 = True
    assert torch.equal(plain(x), after)


def test_what_was_kept_in_8_bits_goes_when_the_training_ends(tmp_path: Path) -> None:
    model = adapted(quantized(tmp_path / "base", "hadamard"))
    set_keep(model, "speed")
    fit(model, tmp_path / "a", steps=1, precision="fp8")
    fitting = choose_fp8(model, wanted=True).layers
    assert fitting
    assert all(len(layer._weights) == 0 for layer in fitting)


def test_forwards_of_few_tokens_are_advised_against_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert advice(1024) is None
    assert "some 512 tokens on each GPU" in str(advice(512.2))
    base = quantized(tmp_path / "base", "hadamard")
    here = fit(adapted(base), tmp_path / "a", steps=1, precision="fp8")
    assert not any("too few for 8-bit" in note for note in here.notes)
    heard: list[str] = []
    run = loop._Run.__new__(loop._Run)
    run.main, run.ranks_before, run.progress = True, 1, Deaf()
    run.engine = cast(loop.Engine, SimpleNamespace(reasons=(), ranks=1, precision=choice_of("fp8"), device=torch.device("cuda")))
    run.total_steps = 1
    monkeypatch.setattr(run, "_note", heard.append)
    run.announce(0, tokens=512.0)
    run.announce(0, tokens=8192.0)
    run.engine.precision = choice_of("bf16")
    run.announce(0, tokens=512.0)
    assert len(heard) == 1
    assert "too few for 8-bit products" in heard[0]


def choice_of(name: str) -> PrecisionChoice:
    return PrecisionChoice(torch.bfloat16, "", fp8=name == "fp8")
