"""Trains the tiny model in a process of its own, for the tests that kill it or start several: WORK_DIR PAUSE_S.

Trains a few of the model's own weights: importing peft would take most of the test's time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from qwha_cli.data.tokenize import Encoded
from qwha_cli.training.loop import train
from qwha_cli.training.metrics import StepMetrics
from qwha_cli.training.settings import TrainSettings
from support.tiny_model import tiny_llama


class Slow:
    """A watcher that says where the run is and leaves time to kill it there."""

    def start(self, total_steps: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None:
        print(f"step {metrics.step}", flush=True)  # noqa: T201 - the test listens to it
        time.sleep(float(sys.argv[2]))

    def validation(self, step: int, loss: float) -> None: ...

    def note(self, text: str) -> None: ...


def examples(count: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(count)
    found: list[Encoded] = []
    for _ in range(count):
        prompt, answer = (int(n) for n in torch.randint(2, 12, (2,), generator=generator))
        ids = torch.randint(0, 256, (prompt + answer,), generator=generator).tolist()
        found.append(Encoded(input_ids=ids, labels=[-100] * prompt + ids[prompt:]))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    train(
        model,
        examples(20),
        encoded_validation=examples(5),
        settings=TrainSettings(
            lr=1e-2, pad_id=256, batch_size=4, accumulation=2, steps=8, precision="fp32", save_every=3, validate_every=4
        ),
        work_dir=work,
        identity="same",
        progress=Slow(),
        interrupted=lambda: False,
    )
    save_file({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, work / "final.safetensors")
