"""The bits of an adapter are counted on its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwha_cli.adapters.build import add_adapter, save_adapter
from qwha_cli.adapters.size import size_summary, stored_bits
from qwha_cli.adapters.spectral.config import Store
from support.adapted import random_sparse
from support.tiny_model import tiny_llama

NAME = "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize(("store", "width"), [("bfloat16", 16), ("float32", 32)])
def test_an_entry_costs_its_value_and_a_byte_and_the_header_does_not_count(tmp_path: Path, store: Store, width: int) -> None:
    rows = {NAME: random_sparse((48, 80), density=0.1)}
    entries = len(rows[NAME].values)
    save_adapter(add_adapter(tiny_llama(), rank=4, scale=1.0, targets=[NAME], start=rows, store=store), tmp_path)
    bits = (width + 8) * entries + 8  # one byte ends the places' stream
    assert stored_bits(tmp_path) == bits
    summary = size_summary(tmp_path, entries=entries, base_bits_per_weight=2.25, weights=48 * 80)
    assert summary == {"adapter_bits_per_entry": bits / entries, "bits_per_weight": 2.25 + bits / (48 * 80)}
