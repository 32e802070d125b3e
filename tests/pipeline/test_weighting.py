"""Tokens weighted by what the loss minds, and one budget over all layers, through the stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwha_cli.artifacts.tensors import read_tensors
from qwha_cli.errors import RecipeError
from qwha_cli.models.sensitivity import Sensitivity
from qwha_cli.quant.checkpoint import load_base
from qwha_cli.recipe.load import load_recipe
from qwha_cli.stages.runner import run_stages
from support.recording import RecordingEvents

KEPT = Path("calibration") / "sensitivity.safetensors"


def run(output: Path, *overrides: str, until: str = "init") -> Path:
    recipe = load_recipe("tiny-random", [f"output={output}", *overrides])
    run_stages(recipe, until=until, events=RecordingEvents())
    return output / "tiny-random"


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "layers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = ("quantize.calibration.weighting=gradient", "init.budget=global", "adapter.rank=3")
    return run(tmp_path_factory.mktemp("weighted"), *changes)


def test_quantize_keeps_what_the_loss_minds_of_every_layer_beside_a_base_that_loads(weighted: Path) -> None:
    found = Sensitivity.from_tensors(read_tensors(weighted / "1-quantize" / KEPT))
    names = {record["name"] for record in lines(weighted / "1-quantize")}
    assert names <= set(found.tokens)
    assert {f"model.layers.{index}" for index in (0, 1)} == set(found.tokens) - names
    assert all(tokens.shape == (8, 64) and float(tokens.min()) >= 0 for tokens in found.tokens.values())
    load_base(weighted / "1-quantize", dtype=torch.float32)


def test_a_global_budget_is_shared_unevenly_and_spent_to_the_last_entry(weighted: Path) -> None:
    records = lines(weighted / "2-init")
    own = [3 * sum(record["shape"]) for record in records]  # pyright: ignore[reportArgumentType]
    assert sum(int(record["entries"]) for record in records) == sum(own)  # pyright: ignore[reportArgumentType]
    assert [record["entries"] for record in records] != own
    assert all(int(record["entries_min"]) >= 2 for record in records)  # pyright: ignore[reportArgumentType]
    assert all(record["error_after"] < record["error_zero"] for record in records)  # pyright: ignore[reportOperatorIssue]


def test_weights_change_the_codes_and_the_same_run_gives_the_same_codes(weighted: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> list[object]:
        return [record["digest"] for record in lines(folder / "1-quantize")]

    again = run(tmp_path / "again", "quantize.calibration.weighting=gradient", "adapter.rank=3", until="quantize")
    even = run(tmp_path / "even", "adapter.rank=3", until="quantize")
    assert digests(again) == digests(weighted) != digests(even)
    assert not (even / "1-quantize" / KEPT).exists()


def test_a_global_budget_without_gradients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-random", [f"output={tmp_path}", "init.budget=global"])
    assert "a global budget needs what the loss minds" in " ".join(map(str, caught.value.problems))
