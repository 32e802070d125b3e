"""What goes wrong for users: each failure has its message, its exit code and its remedy, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qwha_cli.artifacts.manifest import read_manifest
from qwha_cli.cli.app import app


def fail(output: Path, *arguments: str, command: str = "run") -> tuple[int, dict[str, object], str]:
    """Run the command line on the smoke recipe; return exit code, the error object of --json, and what people read."""
    result = CliRunner().invoke(app, [command, "tiny-random", f"output={output}", *arguments, "--json"])
    assert "Traceback" not in result.output
    return result.exit_code, json.loads(result.stdout)["error"], result.stderr


def published(output: Path) -> list[str]:
    """Return the artifacts of the run, and make sure that nothing else was left of the failed stage."""
    run = output / "tiny-random"
    assert [p.name for p in run.glob(".*.draft")] == []
    folders = [p for p in sorted(run.glob("[1-5]-*")) if p.is_dir()]
    assert all(read_manifest(folder) is not None for folder in folders)
    return [folder.name for folder in folders]


def test_wrong_model_id(tmp_path: Path) -> None:
    code, error, text = fail(tmp_path, "model.id=nobody/no-such-model")
    assert (code, error["code"]) == (1, "model")
    assert "nobody/no-such-model" in text
    assert "remedy: " in text
    assert published(tmp_path) == []


def test_gated_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args: object, **kwargs: object) -> str:
        raise GatedRepoError.__new__(GatedRepoError)  # its __init__ wants a response of whichever HTTP library is in use

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    code, error, text = fail(tmp_path, "model.id=owner/gated")
    assert (code, error["code"]) == (1, "model")
    assert "gated" in text
    assert "https://huggingface.co/owner/gated" in str(error["remedy"])
    assert published(tmp_path) == []


def test_foreign_artifact_is_said_to_be_one_and_set_aside(tmp_path: Path) -> None:
    place = tmp_path / "tiny-random" / "1-quantize"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text('{"schema": 99}')
    (place / "weights.bin").write_text("mine")
    result = CliRunner().invoke(app, ["quantize", "tiny-random", f"output={tmp_path}"])
    assert result.exit_code == 0, result.output
    assert "manifest schema 99" in result.stderr
    assert published(tmp_path) == ["1-quantize"]
    kept = list((tmp_path / "tiny-random" / "archive").rglob("weights.bin"))
    assert [file.read_text() for file in kept] == ["mine"]


def test_missing_calibration_file(tmp_path: Path) -> None:
    code, error, text = fail(tmp_path, "quantize.calibration.data=no/such/file.txt")
    assert (code, error["code"]) == (1, "data")
    assert "no/such/file.txt" in text
    assert published(tmp_path) == []


def test_test_data_is_refused_for_calibration(tmp_path: Path) -> None:
    code, error, text = fail(tmp_path, "quantize.calibration.split=test")
    assert (code, error["code"]) == (2, "recipe")
    assert "test" in text
    file = tmp_path / "wiki.test.txt"
    file.write_text("some words " * 1000)
    code, error, _ = fail(tmp_path / "runs", f"quantize.calibration.data={file}")
    assert (code, error["code"]) == (1, "data")


def test_missing_training_file_keeps_the_finished_stages(tmp_path: Path) -> None:
    code, error, text = fail(tmp_path, "train.data.format=gsm8k", "train.data.path=no-such.jsonl")
    assert (code, error["code"]) == (1, "data")
    assert "no-such.jsonl" in text
    assert published(tmp_path) == ["1-quantize", "2-init"]


def test_architecture_without_linear_layers_in_blocks(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 320}))
    code, error, text = fail(tmp_path, f"model.id=random:{config}")
    assert (code, error["code"]) == (1, "model")
    assert "remedy: " in text
    assert published(tmp_path) == []


def test_layer_that_groups_do_not_divide(tmp_path: Path) -> None:
    code, error, _ = fail(tmp_path, "quantize.group_size=64")
    assert (code, error["code"]) == (1, "model")
    assert "layers.0" in str(error["where"])
    assert "quantize.exclude" in str(error["remedy"])
    assert published(tmp_path) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qwha_cli.stages.quantize.assemble", full)
    code, error, text = fail(tmp_path)
    assert (code, error["code"]) == (1, "resource")
    assert "disk is full" in text
    assert published(tmp_path) == []


def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    code, error, text = fail(tmp_path, "train.lr=1e30", "train.precision=fp32", "train.clip=null")
    assert (code, error["code"]) == (1, "numerics")
    assert "lr" in text
    assert published(tmp_path) == ["1-quantize", "2-init"]


def test_out_of_gpu_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: object, **kwargs: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("qwha_cli.stages.calibrated.walk", exhausted)
    code, error, text = fail(tmp_path)
    assert (code, error["code"]) == (1, "resource")
    assert "quantize.calibration.batch_size" in text
    assert published(tmp_path) == []


def test_corrupted_base_is_found_when_it_is_read(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["quantize", "tiny-random", f"output={tmp_path}"]).exit_code == 0
    weights = tmp_path / "tiny-random" / "1-quantize" / "model.safetensors"
    size = weights.stat().st_size
    tensors = load_file(weights)
    tensors[next(name for name in tensors if name.endswith("qweight"))][0, 0] ^= 1  # one bit: only the contents can tell
    save_file(tensors, weights, metadata={"format": "pt"})
    assert weights.stat().st_size == size
    code, error, text = fail(tmp_path, command="init")
    assert (code, error["code"]) == (1, "artifact")
    assert "1-quantize" in text
    result = CliRunner().invoke(app, ["init", "tiny-random", f"output={tmp_path}", "--verify"])
    assert result.exit_code == 0, result.output


def test_recipe_errors_come_all_at_once_with_exit_code_2(tmp_path: Path) -> None:
    code, error, text = fail(tmp_path, "train.lrr=1", "quantize.bits=5")
    assert (code, error["code"]) == (2, "recipe")
    assert len(error["problems"]) == 2  # type: ignore[arg-type]
    assert "train.lr" in text


def train_command(output: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "qwha_cli",
        "train",
        "tiny-random",
        f"output={output}",
        "train.steps=40",
        "adapter.store=float32",
        *overrides,
    ]


def wait_for_checkpoint(process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(output.glob("tiny-random/.work/3-train-*/checkpoints/step-*")):
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)


def command(name: str, output: Path, *overrides: str) -> list[str]:
    config = output.parent / "deep.json"
    if not config.exists():
        shape = {
            "vocab_size": 260,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        config.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 10, "max_position_embeddings": 256, **shape}))
    return [sys.executable, "-m", "qwha_cli", name, "tiny-random", f"model.id=random:{config}", f"output={output}", *overrides]


def stop_behind_a_block(run: list[str], output: Path, stage: str, number: signal.Signals) -> int:
    """Start a command, send a signal once the stage has finished three blocks, and return how many it had in the end."""
    process = subprocess.Popen(run, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    blocks = f"tiny-random/.work/{stage}-*/blocks/0*.json"
    while len(list(output.glob(blocks))) < 3:
        assert process.poll() is None, "the stage ended before it could be stopped"
        assert time.monotonic() < deadline, "no block was finished"
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    return len(list(output.glob(blocks)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "number"), [("quantize", "1-quantize", signal.SIGKILL), ("init", "2-init", signal.SIGINT)]
)
def test_a_stage_stopped_between_blocks_keeps_them_and_ends_with_the_same_files(
    tmp_path: Path, name: str, stage: str, number: signal.Signals
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = subprocess.run(command(name, whole), env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    kept = stop_behind_a_block(command(name, stopped), stopped, stage, number)
    assert 3 <= kept < 10
    assert not (stopped / "tiny-random" / stage).exists()
    again = subprocess.run(command(name, stopped, "--resume", "--json"), env=environment, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr.decode()
    notes = json.loads(again.stdout)["stages"][name]["notes"]
    assert f"continued behind {kept} blocks that an earlier run of this stage had finished" in notes
    for file in ("model.safetensors", "adapter_model.safetensors"):
        left, right = whole / "tiny-random" / stage / file, stopped / "tiny-random" / stage / file
        assert left.exists() == right.exists()
        assert not left.exists() or left.read_bytes() == right.read_bytes()


def test_without_resume_a_stage_starts_over(tmp_path: Path) -> None:
    output = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stop_behind_a_block(command("quantize", output), output, "1-quantize", signal.SIGKILL)
    again = subprocess.run(
        command("quantize", output, "--no-resume", "--json"), env=environment, capture_output=True, check=False
    )
    assert again.returncode == 0, again.stderr.decode()
    assert not any("continued" in note for note in json.loads(again.stdout)["stages"]["quantize"]["notes"])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_stopped_training_continues_to_the_same_values(tmp_path: Path, number: signal.Signals, code: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(train_command(tmp_path / "whole"), env=environment, capture_output=True, check=False)
    assert whole.returncode == 0, whole.stderr.decode()
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(train_command(stopped), env=environment, stderr=subprocess.PIPE)
    wait_for_checkpoint(process, stopped)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not (stopped / "tiny-random" / "3-train").exists()
    again = subprocess.run(train_command(stopped), env=environment, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr.decode()
    assert b"continu" in again.stderr or b"resum" in again.stderr
    assert published(stopped) == ["1-quantize", "2-init", "3-train"]
    left, right = (load_file(p / "tiny-random" / "3-train" / "adapter_model.safetensors") for p in (tmp_path / "whole", stopped))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
