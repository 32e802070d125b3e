"""Checkpoints are all or nothing, whatever kills the process or fills the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from qwha_cli.errors import ArtifactError, ResourceError
from qwha_cli.training import checkpoint as module
from qwha_cli.training.checkpoint import CheckpointState, list_checkpoints, load_latest, remove_drafts, save_checkpoint

TENSORS = {"values/a": torch.arange(6.0).reshape(2, 3), "step/a": torch.tensor(4.0)}


def state(step: int) -> CheckpointState:
    return CheckpointState(step=step, identity="me", wall_s=1.5)


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(4), tensors=TENSORS)
    found = load_latest(tmp_path, identity="me")
    assert found is not None
    assert found.state == state(4)
    assert all(torch.equal(found.tensors[name], TENSORS[name]) for name in TENSORS)


def test_nothing_there_is_not_an_error(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent", identity="me") is None


def test_dying_in_the_middle_of_a_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(4), tensors=TENSORS)
    half = tmp_path / ".step-000008.12345.tmp"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"\x10")
    found = load_latest(tmp_path, identity="me")
    assert found is not None
    assert found.state.step == 4
    remove_drafts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-000004"]


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
    ],
)
def test_a_full_disk_is_said_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    save_checkpoint(tmp_path, state(4), tensors=TENSORS)

    def fail(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise fault

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(ResourceError, match="the disk is full"):
        save_checkpoint(tmp_path, state(8), tensors=TENSORS)
    assert os.listdir(tmp_path) == ["step-000004"]


def test_an_unreadable_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    for step in (4, 8):
        save_checkpoint(tmp_path, state(step), tensors=TENSORS)
    (tmp_path / "step-000008" / "tensors.safetensors").write_bytes(b"rotten")
    found = load_latest(tmp_path, identity="me")
    assert found is not None
    assert found.state.step == 4
    save_checkpoint(tmp_path, state(8), tensors=TENSORS)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000008"]


def test_only_unreadable_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(4), tensors=TENSORS)
    (tmp_path / "step-000004" / "state.json").write_text("{")
    with pytest.raises(ArtifactError, match="no checkpoint can be read"):
        load_latest(tmp_path, identity="me")


def test_a_foreign_checkpoint_is_refused_with_both_identities(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(4), tensors=TENSORS)
    with pytest.raises(ArtifactError, match="it says me, this run is you"):
        load_latest(tmp_path, identity="you")
