"""Trains the tiny model in a process of its own, for the tests that kill it or start several: WORK_DIR PAUSE_S."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from safetensors.torch import save_file
from test_loop import Recorder, adapted, fit, values

from qwha_cli.training.metrics import StepMetrics


class Slow(Recorder):
    """Leaves time to be killed between steps, and says where it is."""

    def step(self, metrics: StepMetrics) -> None:
        print(f"step {metrics.step}", flush=True)  # noqa: T201 - the test listens to it
        time.sleep(float(sys.argv[2]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    model, _ = fit(work, adapted(), progress=Slow(), batch_size=4, accumulation=2, steps=8, save_every=3)
    save_file(values(model), work / "final.safetensors")
