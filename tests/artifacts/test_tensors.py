"""Tensor files: whole or not there, joined byte by byte into what transformers and safetensors read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qwha_cli.artifacts.blocks import FinishedBlocks
from qwha_cli.artifacts.tensors import join, read_tensors, write_tensors
from qwha_cli.errors import ArtifactError

DTYPES = (torch.uint8, torch.float32, torch.int16, torch.bfloat16, torch.float64, torch.int32, torch.bool)


def part(number: int) -> dict[str, torch.Tensor]:
    """Tensors of every width in odd sizes, so that misplaced bytes show."""
    generator = torch.Generator().manual_seed(number)
    return {
        f"{number}.{index}": (torch.randn(3 + index, 5, generator=generator) * 50).to(dtype) for index, dtype in enumerate(DTYPES)
    }


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        write_tensors(path, part(number))
    return paths


@pytest.mark.parametrize("shard_bytes", [10**9, 700, 1])
def test_what_is_joined_is_every_tensor_once_bit_by_bit(parts: list[Path], tmp_path: Path, shard_bytes: int) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    join(parts, folder, shard_bytes=shard_bytes)
    expected = part(0) | part(1) | part(2)
    found: dict[str, torch.Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        loaded = load_file(file)
        assert not found.keys() & loaded.keys()
        found |= loaded
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {name: (t.dtype, t.shape) for name, t in expected.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(files) == {10**9: 1, 1: 21}.get(shard_bytes, len(files))
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert {name: set(load_file(folder / name)) for name in set(index["weight_map"].values())} == {
            file.name: set(load_file(file)) for file in files
        }
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())


def test_a_name_that_occurs_twice_and_a_file_that_is_cut_off_are_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="occurs twice"):
        join([parts[0], parts[0]], tmp_path, shard_bytes=10**9)
    parts[1].write_bytes(parts[1].read_bytes()[:-3])
    with pytest.raises(ArtifactError, match="ends too early"):
        join(parts, tmp_path, shard_bytes=10**9)
    parts[2].write_bytes(b"12")
    with pytest.raises(ArtifactError, match="no safetensors file"):
        join(parts, tmp_path, shard_bytes=10**9)
    with pytest.raises(ArtifactError, match="cannot read"):
        read_tensors(parts[2])


def test_a_block_is_finished_only_with_both_of_its_files(tmp_path: Path) -> None:
    finished = FinishedBlocks(tmp_path)
    assert finished.records(3) is None
    finished.save(3, part(1), [{"name": "a", "error": 0.5}])
    again = FinishedBlocks(tmp_path)
    assert again.records(3) == [{"name": "a", "error": 0.5}]
    assert torch.equal(again.tensors(3)["1.3"], part(1)["1.3"])
    assert again.records(2) is None
    finished.tensor_file(3).unlink()
    assert again.records(3) is None
    assert not list((tmp_path / "blocks").glob(".*"))
