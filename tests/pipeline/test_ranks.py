"""The command line under torchrun: one rank makes the artifacts, all of them train, and the result is that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

LAUNCHER = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def train(output: Path, *launcher: str, changes: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    # bfloat16 would turn a last bit of float32 into one of its own here and there
    overrides = [f"output={output}", "adapter.store=float32", *changes]
    command = [sys.executable, *launcher, "-m", "qwha_cli", "train", "tiny-random", *overrides]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("training on 2 processes" in done.stderr) == bool(launcher), done.stderr
    return load_file(output / "tiny-random" / "3-train" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), ("adapter.method=lora", "init.method=cloq")], ids=["qwha", "lora"])
def test_two_ranks_under_torchrun_give_the_adapter_of_one_process(tmp_path: Path, changes: tuple[str, ...]) -> None:
    one = train(tmp_path / "one", changes=changes)
    two = train(tmp_path / "two", *LAUNCHER, changes=changes)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
    folders = sorted(p.name for p in (tmp_path / "two" / "tiny-random").glob("[1-5]-*"))
    assert folders == ["1-quantize", "2-init", "3-train"]
