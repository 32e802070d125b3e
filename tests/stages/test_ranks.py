"""What a launcher's environment says about the processes, and what is refused before any stage runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwha_cli.errors import UsageError
from qwha_cli.recipe.load import load_recipe
from qwha_cli.stages import runner
from qwha_cli.stages.plan import plan
from qwha_cli.stages.ranks import check_split, own_ranks
from qwha_cli.stages.runner import run_stages
from qwha_cli.training import precision
from support.recording import RecordingEvents

TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


def test_keeping_dense_weights_of_a_split_base_is_refused() -> None:
    split = own_ranks({**TWO, "ACCELERATE_USE_FSDP": "true"})
    for keep in ("auto", "memory", "block"):
        check_split(keep, split)
    check_split("speed", own_ranks(TWO))
    check_split("speed", own_ranks({"ACCELERATE_USE_FSDP": "true"}))
    with pytest.raises(UsageError, match="split") as refused:
        check_split("speed", split)
    assert refused.value.where == "train.keep"


def test_it_is_refused_before_the_stages_that_train_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TWO, "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe("recipes/tiny-random.yaml", overrides=["train.keep=speed"])
    with pytest.raises(UsageError, match="split"):
        run_stages(recipe, until="train", events=RecordingEvents(), root=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_arithmetic_that_the_device_does_not_have_is_refused_before_the_stages_that_train_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "lacks_fp8", lambda device: "this one multiplies no 8-bit numbers")
    recipe = load_recipe("recipes/tiny-random.yaml", overrides=["train.precision=fp8", "quantize.basis=hadamard"])
    with pytest.raises(UsageError, match="no 8-bit numbers"):
        run_stages(recipe, until="train", events=RecordingEvents(), root=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # who asks for less is not kept from it, nor who has trained elsewhere
    run_stages(recipe, until="quantize", events=RecordingEvents(), root=tmp_path / "run")
    trained = plan(recipe, root=tmp_path / "run")["train"]
    monkeypatch.setattr(runner, "own_manifest", lambda folder: SimpleNamespace(key=trained.key))
    runner._check_precision(recipe, trained, torch.device("cuda", 0))
