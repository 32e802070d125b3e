"""Which arithmetic training takes, and that it says so; on a GPU, that a resumed run goes on where it was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qwha_cli.data.tokenize import Encoded
from qwha_cli.errors import Interrupted, UsageError
from qwha_cli.training import precision
from qwha_cli.training.loop import train
from qwha_cli.training.metrics import StepMetrics
from qwha_cli.training.precision import choose_precision
from qwha_cli.training.settings import TrainSettings
from support.tiny_model import tiny_llama

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "dtype", "word"), [(True, torch.bfloat16, "has bf16"), (False, None, "no native bf16")])
def test_auto_takes_bf16_only_where_the_cpu_multiplies_it(
    native: bool, dtype: torch.dtype | None, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_multiplies_bf16", lambda: native)
    choice = choose_precision("auto", device=CPU)
    assert choice.autocast == dtype
    assert word in choice.reason


def test_what_the_recipe_names_is_taken_at_its_word() -> None:
    assert choose_precision("fp32", device=CPU).autocast is None
    assert choose_precision("bf16", device=CPU).autocast == torch.bfloat16


def test_fp8_is_bf16_with_smaller_products_and_never_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose_precision("fp8", device=CPU)
    assert (choice.autocast, choice.fp8, choice.name) == (torch.bfloat16, True, "fp8")
    assert "as float32" in choice.reason
    assert not choose_precision("auto", device=CPU).fp8
    assert choose_precision("fp32", device=CPU).name == "fp32"
    assert choose_precision("bf16", device=CPU).name == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    with pytest.raises(UsageError, match="Old Card multiplies no 8-bit"):
        choose_precision("fp8", device=torch.device("cuda", 0))


class Watcher:
    """Keeps the steps and the notes."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self.notes: list[str] = []

    def start(self, total_steps: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def validation(self, step: int, loss: float) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def fit(work: Path, device: str, *, stop_after: int | None = None) -> tuple[Watcher, torch.Tensor]:
    model = tiny_llama().to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    data = [
        Encoded(input_ids=list(range(start, start + 12)), labels=[-100] * 4 + list(range(start + 4, start + 12)))
        for start in range(16)
    ]
    asked = iter(range(1, 100))
    watcher = Watcher()
    train(
        model,
        data,
        encoded_validation=data[:3],
        settings=TrainSettings(lr=5e-3, pad_id=256, steps=12, batch_size=4, save_every=5, validate_every=6),
        work_dir=work,
        identity="same",
        progress=watcher,
        interrupted=lambda: next(asked) == stop_after,
    )
    return watcher, model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach().cpu()


def test_the_choice_is_noted(tmp_path: Path) -> None:
    watcher, _ = fit(tmp_path, "cpu")
    assert watcher.notes[0] == choose_precision("auto", device=CPU).reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_ten_steps_are_finite_and_a_resumed_run_ends_with_the_same_values(tmp_path: Path) -> None:
    watcher, straight = fit(tmp_path / "a", "cuda")
    assert all(math.isfinite(m.loss) and math.isfinite(m.grad_norm) for m in watcher.steps)
    assert watcher.steps[-1].loss < watcher.steps[0].loss
    with pytest.raises(Interrupted):
        fit(tmp_path / "b", "cuda", stop_after=7)
    resumed, values = fit(tmp_path / "b", "cuda")
    assert [m.step for m in resumed.steps] == list(range(8, 13))
    torch.testing.assert_close(values, straight, rtol=1e-4, atol=1e-5)
