"""The training loop on a tiny model under an ordinary peft LoRA: what is minimised, and that stopping never changes it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from qwha_cli.data.tokenize import Encoded
from qwha_cli.errors import ArtifactError, DataError, Interrupted, NumericsError, ResourceError, UsageError
from qwha_cli.training.checkpoint import list_checkpoints
from qwha_cli.training.loop import train
from qwha_cli.training.metrics import TIMING_FIELDS, StepMetrics, read_metrics
from qwha_cli.training.settings import TrainResult, TrainSettings
from support.tiny_model import tiny_llama


class Recorder:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.total = 0
        self.steps: list[StepMetrics] = []
        self.validations: list[tuple[int, float]] = []
        self.notes: list[str] = []

    def start(self, total_steps: int) -> None:
        self.total = total_steps

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def validation(self, step: int, loss: float) -> None:
        self.validations.append((step, loss))

    def note(self, text: str) -> None:
        self.notes.append(text)


def adapted(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=dropout)
    return get_peft_model(tiny_llama(), config)


def examples(count: int = 20, *, seed: int = 3) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    found: list[Encoded] = []
    for _ in range(count):
        prompt, answer = (int(n) for n in torch.randint(2, 12, (2,), generator=generator))
        ids = torch.randint(0, 256, (prompt + answer,), generator=generator).tolist()
        found.append(Encoded(input_ids=ids, labels=[-100] * prompt + ids[prompt:]))
    return found


SETTINGS = {"lr": 1e-2, "pad_id": 256, "steps": 8, "batch_size": 4, "precision": "fp32", "save_every": 4, "validate_every": 4}


def fit(
    work: Path,
    model: nn.Module | None = None,
    *,
    data: list[Encoded] | None = None,
    validation: list[Encoded] | None = None,
    identity: str = "same",
    interrupted: Callable[[], bool] = lambda: False,
    progress: Recorder | None = None,
    **settings: object,
) -> tuple[nn.Module, TrainResult]:
    model = adapted() if model is None else model
    result = train(
        model,
        examples() if data is None else data,
        encoded_validation=examples(5, seed=4) if validation is None else validation,
        settings=TrainSettings(**{**SETTINGS, **settings}),  # type: ignore[arg-type]
        work_dir=work,
        identity=identity,
        progress=progress or Recorder(),
        interrupted=interrupted,
    )
    return model, result


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def untimed(path: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def after_steps(count: int) -> Callable[[], bool]:
    asked = iter(range(1, 1000))
    return lambda: next(asked) == count


def test_loss_falls_and_only_the_adapter_moves(tmp_path: Path) -> None:
    model = adapted()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    watcher = Recorder()
    _, result = fit(tmp_path, model, data=examples(4), steps=30, progress=watcher)
    assert result.last_loss < 0.7 * result.first_loss
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    assert watcher.total == 30
    assert [m.step for m in watcher.steps] == list(range(1, 31))
    assert [step for step, _ in watcher.validations] == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert not model.training


def test_first_step_minimises_the_mean_over_all_answer_tokens(tmp_path: Path) -> None:
    data = examples(4)
    model = adapted()
    reference = copy.deepcopy(model)
    nll, count = torch.zeros(()), 0
    for example in data:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
        log_p = reference(ids).logits[0, :-1].log_softmax(-1)
        nll = nll - log_p[torch.arange(len(labels)), labels.clamp(min=0)][labels != -100].sum()
        count += int((labels != -100).sum())
    (nll / count).backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    _, result = fit(tmp_path, model, data=data, steps=1)
    line = read_metrics(result.metrics_path).steps[0]
    assert line.loss == pytest.approx((nll / count).item(), rel=1e-5)
    assert line.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert line.tokens == sum(len(e.input_ids) for e in data)


def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "a", batch_size=4, accumulation=1)
    parts, _ = fit(tmp_path / "b", batch_size=1, accumulation=4)
    for name, tensor in values(whole).items():
        torch.testing.assert_close(tensor, values(parts)[name], rtol=1e-4, atol=1e-6)


def test_packing_gives_the_loss_of_padding(tmp_path: Path) -> None:
    data = examples(12)
    _, padded = fit(tmp_path / "a", data=data, steps=1, batch_size=12)
    rows = Recorder()
    _, packed = fit(
        tmp_path / "b", data=data, steps=1, batch_size=1, accumulation=20, packing=True, max_length=300, progress=rows
    )
    assert packed.first_loss == pytest.approx(padded.first_loss, rel=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path / "a")
    recomputed, _ = fit(tmp_path / "b", checkpointing=True)
    for name, tensor in values(plain).items():
        torch.testing.assert_close(tensor, values(recomputed)[name], rtol=1e-5, atol=1e-7)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in recomputed.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_wants_a_gradient_below_the_first_adapter(tmp_path: Path, checkpointing: bool) -> None:
    model = adapted()
    wanted: list[bool] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: wanted.append(output.requires_grad))
    model.get_submodule("base_model.model.model.layers.0").register_forward_pre_hook(
        lambda module, args: wanted.append(args[0].requires_grad)
    )
    fit(tmp_path, model, checkpointing=checkpointing, steps=1, validate_every=None)
    assert wanted
    assert not any(wanted)


def test_bf16_trains_values_that_stay_float32(tmp_path: Path) -> None:
    model, result = fit(tmp_path, data=examples(4), steps=20, precision="bf16")
    assert result.precision == "bf16"
    assert result.last_loss < result.first_loss
    assert all(tensor.dtype == torch.float32 for tensor in values(model).values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, dropout: float) -> None:
    straight, _ = fit(tmp_path / "straight", adapted(dropout=dropout))
    with pytest.raises(Interrupted, match="stopped after step 3 of 8") as stopped:
        fit(tmp_path / "broken", adapted(dropout=dropout), interrupted=after_steps(3))
    assert stopped.value.exit_code == 130
    watcher = Recorder()
    continued, result = fit(tmp_path / "broken", adapted(dropout=dropout), progress=watcher)
    assert result.resumed_from == 3
    assert [m.step for m in watcher.steps] == [4, 5, 6, 7, 8]
    assert any("step 3 of 8" in note for note in watcher.notes)
    assert equal(values(straight), values(continued))
    assert untimed(tmp_path / "straight" / "metrics.jsonl") == untimed(tmp_path / "broken" / "metrics.jsonl")
    ends = [list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("straight", "broken")]
    assert (ends[0] / "tensors.safetensors").read_bytes() == (ends[1] / "tensors.safetensors").read_bytes()


def test_moments_of_eight_bits_train_and_resume_bit_for_bit(tmp_path: Path) -> None:
    # large enough tensors for bitsandbytes to keep their moments in 8 bits
    def wide() -> nn.Module:
        torch.manual_seed(7)
        return get_peft_model(tiny_llama(), LoraConfig(r=96, target_modules=["q_proj"], init_lora_weights=False))

    few = examples(4)
    straight, result = fit(tmp_path / "a", wide(), data=few, optimizer="adamw8bit")
    assert result.last_loss < result.first_loss
    with pytest.raises(Interrupted):
        fit(tmp_path / "b", wide(), data=few, optimizer="adamw8bit", interrupted=after_steps(3))
    resumed, _ = fit(tmp_path / "b", wide(), data=few, optimizer="adamw8bit")
    assert equal(values(straight), values(resumed))
    saved = load_file(list_checkpoints(tmp_path / "b" / "checkpoints")[-1] / "tensors.safetensors")
    kinds = {tensor.dtype for name, tensor in saved.items() if name.startswith("state1/")}
    assert kinds == {torch.uint8}


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    trained, first = fit(tmp_path)
    watcher = Recorder()
    again, second = fit(tmp_path, progress=watcher)
    assert watcher.steps == []
    assert equal(values(trained), values(again))
    assert second.last_loss == first.last_loss
    assert second.tokens == first.tokens


def test_only_the_last_two_checkpoints_stay(tmp_path: Path) -> None:
    fit(tmp_path, steps=10, save_every=2)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000008", "step-000010"]


def test_a_checkpoint_of_other_settings_is_refused_with_both_identities(tmp_path: Path) -> None:
    fit(tmp_path, identity="aaa111")
    with pytest.raises(ArtifactError, match=r"aaa111.*bbb222"):
        fit(tmp_path, identity="bbb222")


def test_not_finite_loss_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = adapted()

    class Poison(Recorder):
        def step(self, metrics: StepMetrics) -> None:
            if metrics.step == 5:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    with pytest.raises(NumericsError, match=r"step 6 of 8.*nan.*step-000004"):
        fit(tmp_path, model, progress=Poison())
    assert [line.step for line in read_metrics(tmp_path / "metrics.jsonl").steps] == [1, 2, 3, 4, 5]
    straight, _ = fit(tmp_path / "straight")
    recovered, result = fit(tmp_path)
    assert result.resumed_from == 4
    assert equal(values(straight), values(recovered))


def test_out_of_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(ResourceError, match=r"Tried to allocate 2.00 GiB\.\)") as caught:
        fit(tmp_path, model, validation=[])
    assert "train.batch_size" in str(caught.value.remedy)


def test_examples_without_an_answer_are_passed_over_and_none_at_all_is_refused(tmp_path: Path) -> None:
    empty = Encoded(input_ids=[1, 2, 3], labels=[-100] * 3)
    clean, _ = fit(tmp_path / "a", data=examples(4))
    mixed, _ = fit(tmp_path / "b", data=[*examples(4), empty])
    assert equal(values(clean), values(mixed))
    with pytest.raises(DataError, match="none of 2 training examples"):
        fit(tmp_path / "c", data=[empty, empty])


def test_a_model_without_trained_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no parameter to train"):
        fit(tmp_path, tiny_llama().requires_grad_(False))
