"""Whether dense weights are kept: as asked, or where they take a quarter of what a GPU has free."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwha_cli.adapters.keep import choose_keep
from qwha_cli.quant.linear import QuantizedLinear
from support.quantized import gaussian, options, run_quantizer

CUDA = torch.device("cuda")


def model() -> nn.Module:
    packed = run_quantizer(gaussian(96, 64), None, options("rtn", 2, 16))
    return nn.Sequential(QuantizedLinear.from_packed(packed), nn.Linear(96, 96))


# of one layer in bfloat16; what is not packed does not count
DENSE = 96 * 64 * 2


@pytest.mark.parametrize(
    ("free", "unused", "keep"), [(4 * DENSE, 0, "speed"), (3 * DENSE, DENSE, "speed"), (4 * DENSE - 1, 0, "memory")]
)
def test_a_gpu_with_four_times_the_room_keeps_them(monkeypatch: pytest.MonkeyPatch, free: int, unused: int, keep: str) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 + unused)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    choice = choose_keep("auto", model(), dtype=torch.bfloat16, device=CUDA)
    assert choice.keep == keep
    assert "GiB free" in choice.reason


def test_a_cpu_makes_them_again_and_what_the_recipe_asks_for_is_done() -> None:
    assert choose_keep("auto", model(), dtype=torch.float32, device=torch.device("cpu")).keep == "memory"
    for asked in ("memory", "speed"):
        choice = choose_keep(asked, model(), dtype=torch.float32, device=CUDA)
        assert choice.keep == asked
        assert "as the recipe asks" in choice.reason
