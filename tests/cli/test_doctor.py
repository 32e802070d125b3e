"""The doctor: what is required and broken fails, what is missing but optional warns."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from qwha_cli.cli import doctor
from qwha_cli.cli.app import app
from qwha_cli.kernels import fp8


def test_this_machine_is_healthy_and_says_so_in_both_forms() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["healthy"]) == (0, True), done.stderr
    names = {check["name"] for check in told["checks"]}
    assert names >= {"python", "torch", "transformers", "cpu", "disk", "memory", "cache", "hub", "demo model"}
    assert "bfloat16" in done.stderr


def test_every_declared_requirement_is_checked() -> None:
    declared = [line for line in importlib.metadata.requires("qwha") or [] if "extra ==" not in line]
    assert len(declared) >= 14
    assert len(list(doctor.check_packages())) == len(declared)


@pytest.mark.parametrize(
    ("requirement", "state"), [("rich>=14", "ok"), ("rich<1", "broken"), ("no-such-package-at-all>=1", "broken")]
)
def test_a_package_is_held_to_its_range(requirement: str, state: str) -> None:
    check = doctor.check_package(Requirement(requirement))
    assert check.state == state
    assert check.remedy is None or requirement.partition(">")[0].partition("<")[0] in check.remedy


def test_a_broken_requirement_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [doctor.Check("torch", "broken", "not installed", "pip install torch")]
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["healthy"] is False
    assert "pip install torch" in done.stderr


def test_an_uninstalled_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [check.state for check in doctor.check_packages("no-such-distribution")] == ["broken"]


def test_the_cache_folder_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWHA_CACHE", str(tmp_path / "new" / "cache"))
    check = doctor.check_cache(doctor.cache_folder())
    assert (check.state, check.found) == ("ok", str(tmp_path / "new" / "cache"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    assert doctor.check_cache(tmp_path / "file" / "cache").state == "broken"


def test_offline_switches_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.OFFLINE_SWITCHES:
        monkeypatch.delenv(name, raising=False)
    assert "online" in doctor.check_offline().found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline by HF_HUB_OFFLINE" in doctor.check_offline().found


@pytest.mark.parametrize(
    ("check", "limit"), [(lambda: doctor.check_disk(Path.cwd()), "DISK_GIB"), (doctor.check_memory, "MEMORY_GIB")]
)
def test_scarce_disk_or_memory_warns(monkeypatch: pytest.MonkeyPatch, check: Callable[[], doctor.Check], limit: str) -> None:
    monkeypatch.setattr(doctor, limit, 10**9)
    assert check().state == "warning"


@pytest.mark.parametrize(
    ("capability", "lacking", "found"),
    [((7, 5), "old", "fp32"), ((8, 6), "old", "bf16"), ((8, 9), None, "bf16 or fp8"), ((8, 9), "this torch", "bf16")],
)
def test_a_gpus_precisions_are_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], lacking: str | None, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(fp8, "lacks_fp8", lambda device: lacking)
    check = list(doctor.check_devices())[-1]
    assert (check.name, check.found) == ("cuda:0", f"Some Card, 1.0 of 2.0 GiB free, train.precision {found}")
