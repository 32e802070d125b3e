"""`qwha train --gpus N`: what several processes make, and how they end: one message, one exit code, nobody left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # processes that import torch and transformers

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
GPUS = ("--gpus", "2", "--device", "cpu")
EXACT = "adapter.store=float32"


def start(output: Path, *words: str, fault: str | None = None) -> subprocess.Popen[str]:
    env = dict(ENVIRONMENT)
    if fault is not None:
        # imported by every Python process at its start: the fault is in rank 1 only
        folder = output.parent / "fault"
        folder.mkdir(exist_ok=True)
        lines = "".join(f"    {line}\n" for line in fault.splitlines())
        (folder / "sitecustomize.py").write_text(f"import os\nif os.environ.get('RANK') == '1':\n{lines}")
        env["PYTHONPATH"] = os.pathsep.join([str(folder), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "qwha_cli", "train", "tiny-random", f"output={output}", EXACT, *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def messages(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith(("error:", "interrupted:"))]


@pytest.fixture(scope="module")
def initialised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs in which tiny-random is quantized and initialised."""
    output = tmp_path_factory.mktemp("initialised")
    command = [sys.executable, "-m", "qwha_cli", "init", "tiny-random", f"output={output}", EXACT]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return output


@pytest.fixture
def runs(initialised: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(initialised, tmp_path / "runs"))


def adapter(runs: Path) -> dict[str, torch.Tensor]:
    return load_file(runs / "tiny-random" / "3-train" / "adapter_model.safetensors")


def assert_nearly_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def wait_for_step(runs: Path, step: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for log in (runs / "tiny-random" / ".work").glob("*/metrics.jsonl"):
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
            if any(line.get("step", 0) >= step and "lr" in line for line in lines):
                return
        time.sleep(0.1)
    raise AssertionError(f"no step {step}")


def rank_pids(parent: int) -> list[int]:
    """The processes of a launch, in the order of their ranks."""
    found = {}
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        variables = dict(pair.split("=", 1) for pair in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in pair)
        if "RANK" in variables:
            found[int(variables["RANK"])] = int(child)
    return [found[rank] for rank in sorted(found)]


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_two_processes_make_one_processs_adapter_and_the_command_is_printed_once(runs: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs, tmp_path / "other"))
    code, out, err = finish(start(runs, *GPUS, "--json"))
    assert code == 0, err
    assert json.loads(out)["stages"]["train"]["fresh"] is False
    launches = [line for line in err.splitlines() if "torch.distributed.run" in line]
    assert len(launches) == 1
    assert "--nproc-per-node 2 --standalone -m qwha_cli train tiny-random" in launches[0]
    assert err.count("train    done") == err.count("training on 2 processes of 1 sequences each") == 1
    code, _, err = finish(start(other))
    assert code == 0, err
    assert_nearly_equal(adapter(other), adapter(runs))


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)], ids=["one then two", "two then one"])
def test_a_run_goes_on_with_another_number_of_processes_and_says_so(runs: Path, tmp_path: Path, ranks: tuple[int, int]) -> None:
    whole = Path(shutil.copytree(runs, tmp_path / "whole"))
    longer = ("train.steps=60", "train.save_every=2")
    launch = {1: (), 2: GPUS}
    first = start(runs, *longer, *launch[ranks[0]])
    wait_for_step(runs, 6)
    first.send_signal(signal.SIGINT)
    code, _, err = finish(first)
    assert code == 130, err
    assert len(messages(err)) == 1
    assert "the state is saved" in err
    code, _, err = finish(start(runs, *longer, *launch[ranks[1]]))
    assert code == 0, err
    assert f"continued with {ranks[1]} processes, started with {ranks[0]}" in err
    assert finish(start(whole, *longer))[0] == 0
    one, other = adapter(whole), adapter(runs)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_scheduler_may_end_it_and_the_state_is_saved(runs: Path) -> None:
    process = start(runs, "train.steps=500", *GPUS)
    wait_for_step(runs, 3)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 130, err
    assert len(messages(err)) == 1
    assert "the state is saved" in err


def test_one_killed_process_ends_all_with_one_message(runs: Path) -> None:
    process = start(runs, "train.steps=500", *GPUS)
    wait_for_step(runs, 3)
    pids = rank_pids(process.pid)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1, err
    assert len(messages(err)) == 1, err
    assert "the same command continues" in err
    assert "Traceback" not in err
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        ("GateError('rank one has seen enough')", 1, "rank one has seen enough"),
        ("UsageError('rank one was asked too much')", 2, "rank one was asked too much"),
        ("ZeroDivisionError('by rank one')", 1, "this is a bug in qwha"),
    ],
)
def test_an_error_of_one_rank_is_told_once_with_its_exit_code(runs: Path, raised: str, code: int, told: str) -> None:
    fault = (
        "from qwha_cli.errors import GateError, UsageError\nfrom qwha_cli.training.engine import Engine\n"
        f"def update(self, lr):\n    raise {raised}\nEngine.update = update"
    )
    found, out, err = finish(start(runs, *GPUS, "--json", fault=fault))
    assert found == code, err
    assert len(messages(err)) == 1, err
    assert told in err
    assert "Traceback" not in err
    assert json.loads(out)["error"]["exit_code"] == code


def test_an_error_of_all_ranks_is_told_once(runs: Path) -> None:
    code, _, err = finish(start(runs, *GPUS, "train.max_length=2"))
    assert code == 1, err
    assert len(messages(err)) == 1, err
    assert "raise train.max_length" in err
    assert "Traceback" not in err


def test_a_base_split_over_the_processes_trains_to_the_same_bits_under_accelerate(runs: Path, tmp_path: Path) -> None:
    configs = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
    found = {}
    # two validations of three examples: ranks with unlike numbers of batches
    words = ("train.validation.examples=3", "train.validation.every=3", "model.device=cpu")
    for name in ("ddp", "fsdp"):
        output = Path(shutil.copytree(runs, tmp_path / name))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(configs / f"{name}.yaml")]
        command = [*launcher, "-m", "qwha_cli", "train", "tiny-random", f"output={output}", EXACT, *words]
        done = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "training on 2 processes" in done.stderr
        assert ("the packed base is split" in done.stderr) == (name == "fsdp")
        found[name] = (output / "tiny-random" / "3-train" / "adapter_model.safetensors").read_bytes()
    assert found["ddp"] == found["fsdp"]


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp", "multi-node"])
def test_accelerates_configurations_are_configurations_of_accelerate(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(Path(__file__).resolve().parents[2] / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.mixed_precision == "no"
