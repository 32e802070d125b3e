"""Processes that are killed, and processes that train together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # three processes, each importing torch and transformers

SCRIPT = Path(__file__).with_name("train_script.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(work: Path, *launcher: str, pause_s: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(SCRIPT), str(work), str(pause_s)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]


class Straight:
    """An unbroken run of one process; goes on in the background until its folder is asked for."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._process = start(work)

    @property
    def folder(self) -> Path:
        if self._process.returncode is None:
            finish(self._process)
        return self._work


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(tmp_path_factory.mktemp("straight"))


def test_kill_dash_nine_and_the_same_command_give_the_values_of_an_unbroken_run(straight: Straight, tmp_path: Path) -> None:
    process = start(tmp_path, pause_s=0.3)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "step 5\n":
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-000003"]
    finish(start(tmp_path))
    whole, resumed = load_file(straight.folder / "final.safetensors"), load_file(tmp_path / "final.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [
        [json.loads(line).get("loss") for line in (work / "metrics.jsonl").read_text().splitlines()]
        for work in (straight.folder, tmp_path)
    ]
    assert losses[0] == losses[1]


def test_two_gloo_ranks_train_the_values_of_one_process(straight: Straight, tmp_path: Path) -> None:
    finish(start(tmp_path, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"))
    whole, shared = load_file(straight.folder / "final.safetensors"), load_file(tmp_path / "final.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-5, atol=1e-5)
    steps = [
        [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()] for work in (straight.folder, tmp_path)
    ]
    assert len(steps[0]) == len(steps[1])
    for one, two in zip(*steps, strict=True):
        assert one.get("tokens") == two.get("tokens")
        for key in {"loss", "validation_loss", "grad_norm"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-4)
