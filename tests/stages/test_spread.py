"""Matrices shared out to several devices: fair shares, the same results to the bit, and the first failure told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from qwha_cli.errors import NumericsError, UsageError
from qwha_cli.quant.gram import Gram
from qwha_cli.recipe.load import load_recipe
from qwha_cli.stages import runner
from qwha_cli.stages.device import device_of_rank, devices_of_stage
from qwha_cli.stages.ranks import Ranks
from qwha_cli.stages.spread import shares, spread
from support.recording import RecordingEvents

CPU = torch.device("cpu")
LLAMA_3B = {
    "q": (3072, 3072),
    "k": (1024, 3072),
    "v": (1024, 3072),
    "o": (3072, 3072),
    "gate": (8192, 3072),
    "up": (8192, 3072),
    "down": (3072, 8192),
}


def test_two_devices_get_halves_of_a_blocks_work_and_every_matrix_is_in_one_share() -> None:
    found = shares(LLAMA_3B, 2)
    assert sorted(name for share in found for name in share) == sorted(LLAMA_3B)
    loads = [sum(LLAMA_3B[name][0] * LLAMA_3B[name][1] ** 2 for name in share) for share in found]
    assert max(loads) / sum(loads) < 0.52
    assert shares({"only": (2, 2)}, 3) == [["only"], [], []]


def test_results_come_in_the_blocks_order_from_threads_of_their_own() -> None:
    gram = Gram(torch.eye(4))
    threads = set()

    def work(name: str, given: Gram) -> str:
        threads.add(threading.get_ident())
        assert given is gram  # not copied to where it is
        return name.upper()

    found = spread(LLAMA_3B, work, grams=dict.fromkeys(LLAMA_3B, gram), devices=[CPU, CPU])
    assert list(found.items()) == [(name, name.upper()) for name in LLAMA_3B]
    assert threading.get_ident() not in threads


def test_the_first_failure_in_the_blocks_order_is_raised() -> None:
    def work(name: str, given: Gram) -> None:
        if name in ("down", "gate"):
            raise NumericsError(f"{name} failed")

    with pytest.raises(NumericsError, match="gate failed"):
        spread(LLAMA_3B, work, grams=dict.fromkeys(LLAMA_3B, Gram(torch.eye(2))), devices=[CPU, CPU])


def test_quantize_and_init_on_two_devices_write_the_same_tensors_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny-random", ["model.device=cpu"])
    events = RecordingEvents()
    for name, devices in {"one": (CPU,), "two": (CPU, CPU)}.items():
        monkeypatch.setattr(runner, "devices_of_stage", lambda *args, devices=devices, **kwargs: devices)
        runner.run_stages(recipe, until="init", events=events, root=tmp_path / name)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("[12]-*/*.safetensors")]
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    for stage in ("1-quantize", "2-init"):
        notes = [json.loads((tmp_path / name / stage / "manifest.json").read_text())["notes"] for name in ("one", "two")]
        assert "each block's matrices shared out to cpu, cpu" in notes[1]
        assert notes[0] == [note for note in notes[1] if "shared out" not in note]


def test_each_rank_has_a_gpu_of_its_own_and_the_first_may_use_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    third = Ranks(rank=2, size=4, local_rank=2, local_size=4)
    assert device_of_rank("auto", third) == torch.device("cuda:2")
    first = Ranks(rank=0, size=4, local_rank=0, local_size=4)
    devices = devices_of_stage(device_of_rank("auto", first), gpus=None, ranks=first)
    assert [str(device) for device in devices] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    alone = Ranks()
    assert devices_of_stage(torch.device("cuda"), gpus=None, ranks=alone) == (torch.device("cuda"),)
    assert devices_of_stage(torch.device("cuda:1"), gpus=2, ranks=alone) == (torch.device("cuda:1"), torch.device("cuda:0"))
    with pytest.raises(UsageError, match="5 GPUs asked for, 4 found"):
        devices_of_stage(torch.device("cuda"), gpus=5, ranks=alone)
    with pytest.raises(UsageError, match="2 GPUs asked for, and model"):
        devices_of_stage(CPU, gpus=2, ranks=alone)
    with pytest.raises(UsageError, match="cuda:1 is one GPU, but there are 4 processes"):
        device_of_rank("cuda:1", third)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_threads_that_are_the_first_to_factorise_do_not_stumble() -> None:
    code = """
import torch
from qwha_cli.quant.gram import Gram
from qwha_cli.stages.spread import spread
device = torch.device("cuda:0")
gram = Gram(torch.eye(64, device=device))
shapes = {name: (64, 64) for name in "abcd"}
factor = lambda name, gram: torch.linalg.cholesky(gram.matrix)
found = spread(shapes, factor, grams=dict.fromkeys(shapes, gram), devices=[device] * 4)
assert all(torch.equal(factor, gram.matrix) for factor in found.values())
"""
    # torch loads its library of factorisations once a process
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
