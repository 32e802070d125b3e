"""A stage is asked for again exactly when something that can change its result has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwha_cli.recipe.load import load_recipe
from qwha_cli.stages.plan import ancestors, plan

ROOT = Path("runs/x")


def changed(*overrides: str) -> set[str]:
    before = plan(load_recipe("tiny-random"), root=ROOT)
    after = plan(load_recipe("tiny-random", list(overrides)), root=ROOT)
    return {name for name in before if before[name].key != after[name].key}


ALL = {"quantize", "init", "train", "eval", "merge"}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("seed=7", ALL),
        ("quantize.bits=3", ALL),
        ("quantize.calibration.samples=3", ALL),
        ("adapter.rank=1", ALL - {"quantize"}),
        ("init.damping=0.5", ALL - {"quantize"}),
        ("train.lr=0.5", {"train", "eval", "merge"}),
        ("merge.into=fp16", {"eval", "merge"}),
        ("eval.batch_size=3", {"eval"}),
        ("train.save_every=1", set()),
        ("train.keep=memory", set()),
        ("model.device=cpu", set()),
        ("name=other", set()),
    ],
)
def test_a_setting_changes_the_keys_of_what_it_can_change(override: str, stages: set[str]) -> None:
    assert changed(override) == stages


def test_a_local_data_file_counts_by_its_contents(tmp_path: Path) -> None:
    file = tmp_path / "calibration.txt"
    file.write_text("one")
    overrides = [f"quantize.calibration.data={file}"]
    first = plan(load_recipe("tiny-random", overrides), root=ROOT)["quantize"].key
    assert plan(load_recipe("tiny-random", overrides), root=ROOT)["quantize"].key == first
    file.write_text("two")
    assert plan(load_recipe("tiny-random", overrides), root=ROOT)["quantize"].key != first


def test_a_stage_needs_all_that_lies_before_it_and_nothing_else() -> None:
    planned = plan(load_recipe("tiny-random"), root=ROOT)
    assert ancestors(planned, "quantize") == ["quantize"]
    assert ancestors(planned, "merge") == ["quantize", "init", "train", "merge"]
    assert ancestors(planned, "eval") == ["quantize", "init", "train", "merge", "eval"]
    base_only = plan(load_recipe("tiny-random", ["eval.rows=[16-bit, base]"]), root=ROOT)
    assert ancestors(base_only, "eval") == ["quantize", "eval"]
