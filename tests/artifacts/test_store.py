"""Artifacts are all or nothing: publication, freshness, damage, locks, full disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwha_cli.artifacts.manifest import Manifest, artifact_key, read_manifest
from qwha_cli.artifacts.store import bring_back, drafting, locked, publish, set_aside, verify
from qwha_cli.errors import ArtifactError, ResourceError


def make(final: Path, key: str, text: str = "data") -> Manifest:
    with drafting(final) as draft:
        (draft / "part").mkdir()
        (draft / "part" / "a.txt").write_text(text)
        return publish(draft, final, manifest=Manifest(stage="quantize", key=key, settings={}, inputs={}))


def test_key_changes_with_settings_and_inputs_but_not_with_order() -> None:
    base = artifact_key("init", {"a": 1, "b": [2]}, inputs={"quantize": "k"})
    assert base == artifact_key("init", {"b": [2], "a": 1}, inputs={"quantize": "k"})
    assert base != artifact_key("init", {"a": 2, "b": [2]}, inputs={"quantize": "k"})
    assert base != artifact_key("init", {"a": 1, "b": [2]}, inputs={"quantize": "l"})
    assert base != artifact_key("train", {"a": 1, "b": [2]}, inputs={"quantize": "k"})


def test_published_artifact_reads_back_with_sizes_and_hashes(tmp_path: Path) -> None:
    written = make(tmp_path / "1-quantize", "k1")
    assert read_manifest(tmp_path / "1-quantize") == written
    assert written.files["part/a.txt"].bytes == 4
    assert verify(tmp_path / "1-quantize", deep=True).key == "k1"
    assert [p.name for p in tmp_path.iterdir()] == ["1-quantize"]


def test_failure_while_drafting_leaves_nothing(tmp_path: Path) -> None:
    def break_off() -> None:
        with drafting(tmp_path / "1-quantize") as draft:
            (draft / "half.bin").write_text("x")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        break_off()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_resource_error_with_remedy_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="disk is full") as caught, drafting(tmp_path / "1-quantize"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 1
    assert "output=" in (caught.value.remedy or "")
    assert list(tmp_path.iterdir()) == []


def test_killed_process_leaves_no_artifact_and_its_draft_is_swept(tmp_path: Path) -> None:
    code = (
        "import sys,time\nfrom pathlib import Path\nfrom qwha_cli.artifacts.store import drafting\n"
        "with drafting(Path(sys.argv[1])) as d:\n (d/'half').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    final = tmp_path / "1-quantize"
    child = subprocess.Popen([sys.executable, "-c", code, str(final)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "ready"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not final.exists()
    assert len(list(tmp_path.iterdir())) == 1
    make(final, "k1")
    assert [p.name for p in tmp_path.iterdir()] == ["1-quantize"]


def test_another_key_moves_the_old_artifact_aside_and_back(tmp_path: Path) -> None:
    final = tmp_path / "1-quantize"
    make(final, "old", "old")
    make(final, "new", "new!")
    assert verify(final).key == "new"
    assert bring_back(final, "old")
    assert verify(final, deep=True).key == "old"
    assert (final / "part" / "a.txt").read_text() == "old"
    assert bring_back(final, "new")
    assert not bring_back(final, "never-made")


def test_incomplete_folder_is_set_aside_not_deleted(tmp_path: Path) -> None:
    final = tmp_path / "1-quantize"
    final.mkdir()
    (final / "mine.txt").write_text("mine")
    place = set_aside(final)
    assert place is not None
    assert (place / "mine.txt").read_text() == "mine"


def test_many_folders_set_aside_are_all_kept(tmp_path: Path) -> None:
    final = tmp_path / "1-quantize"
    for number in range(20):
        final.mkdir()
        (final / "mine.txt").write_text(str(number))
        set_aside(final)
    kept = {file.read_text() for file in (tmp_path / "archive").rglob("mine.txt")}
    assert kept == {str(number) for number in range(20)}


@pytest.mark.parametrize("deep", [False, True])
def test_damage_is_found(tmp_path: Path, deep: bool) -> None:
    final = tmp_path / "1-quantize"
    make(final, "k1")
    (final / "part" / "a.txt").write_text("DATA" if deep else "longer data")
    with pytest.raises(ArtifactError, match=r"1 of 1 files are missing or changed: part/a\.txt") as caught:
        verify(final, deep=deep)
    assert "delete" in (caught.value.remedy or "")


def test_foreign_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": 99}')
    with pytest.raises(ArtifactError, match="schema 99"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("not json")
    with pytest.raises(ArtifactError, match="not a manifest"):
        read_manifest(tmp_path)


def test_second_process_on_the_same_run_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys,time\nfrom pathlib import Path\nfrom qwha_cli.artifacts.store import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline().strip() == "held"
        with pytest.raises(ArtifactError, match=f"another process is working on this run .pid {child.pid}"), locked(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with locked(tmp_path):
                return
        except ArtifactError:
            time.sleep(0.05)
    pytest.fail("the lock did not fall with its process")
