"""A base split over processes: one block's codes are there at a time, between the passes too, whatever is kept of weights."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qwha_cli.adapters.fp8 import choose_fp8, fp8_products
from qwha_cli.adapters.fused_blocks import fused_blocks
from qwha_cli.adapters.keep import set_keep
from qwha_cli.adapters.peft_bridge import register
from qwha_cli.adapters.spectral.config import SpectralConfig
from qwha_cli.training.sharded_base import ShardedBase
from support.adapted import fill, quantize_model
from support.tiny_model import tiny_llama


def train_split(group: str, basis: str, keep: str, fused: bool, fp8: bool) -> None:
    """A pass of a whole and of a split base in a process group of one; gradients and what is alive are asserted."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{group}", rank=0, world_size=1)
    register()
    model = get_peft_model(quantize_model(tiny_llama(), basis), SpectralConfig(rank=4)).train()
    fill(model)
    base = model.get_base_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()
    set_keep(model, keep)
    eight = choose_fp8(model, wanted=fp8)
    gathered: list[StorageWeakRef] = []
    gather = torch.distributed.all_gather_into_tensor

    def remembered(flat: Tensor, part: Tensor) -> None:
        gather(flat, part)
        gathered.append(StorageWeakRef(flat.untyped_storage()))

    def gradients() -> list[Tensor]:
        ids = torch.arange(24)[None]
        model.zero_grad()
        with fp8_products(eight), fused_blocks(base) if fused else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
            there = [not storage.expired() for storage in gathered]
            loss.backward()
        assert sum(there) <= 1, there
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    torch.distributed.all_gather_into_tensor = remembered
    ShardedBase(base, rank=0, ranks=1, device=torch.device("cpu"))
    for one, two in zip(expected, gradients(), strict=True):
        assert torch.equal(two, one)
    # three blocks forward, and two backward: the last is still there then
    assert len(gathered) == 5
    assert sum(not storage.expired() for storage in gathered) <= 1


@pytest.mark.parametrize(
    ("basis", "fused", "fp8"),
    [("weight", False, False), ("hadamard", False, False), ("hadamard", True, False), ("hadamard", True, True)],
)
@pytest.mark.parametrize("keep", ["memory", "block"])
def test_of_a_split_base_one_blocks_codes_are_there(tmp_path: Path, basis: str, fused: bool, fp8: bool, keep: str) -> None:
    # a process of its own: a process group is the whole process's
    arguments = f"{str(tmp_path / 'group')!r}, {basis!r}, {keep!r}, {fused}, {fp8}"
    code = f"from training.test_sharded_base import train_split; train_split({arguments})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, "tests"])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
