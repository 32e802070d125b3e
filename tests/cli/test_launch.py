"""`--gpus`: the torchrun command it becomes, and everything that is refused before anything starts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qwha_cli.cli import launch
from qwha_cli.cli.app import app
from qwha_cli.cli.launch import Launch, stopping
from qwha_cli.stages.ranks import FAILURE_FILE, Ranks, own_ranks


def qwha(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for torchrun; remembers what it was called with."""
    calls: list[list[str]] = []
    monkeypatch.setattr(launch, "_torchrun", lambda arguments: calls.append(list(arguments)))
    for name in ("RANK", "WORLD_SIZE", FAILURE_FILE, "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)  # set first, so that what the launch sets is undone
    return calls


def test_the_command_reaches_torchrun_and_is_printed_so_that_it_can_be_copied(runner: Any, torchrun: list[list[str]]) -> None:
    done = qwha("train", "tiny-random", "output=my runs", "--gpus", "2", "--device", "cpu", "--no-resume", "--json")
    assert done.exit_code == 0, done.stderr
    inner = ["train", "tiny-random", "output=my runs", 'model.device="cpu"', "--no-resume", "--json"]
    assert torchrun == [["--nnodes", "1", "--nproc-per-node", "2", "--standalone", "-m", "qwha_cli", *inner]]
    assert "-m torch.distributed.run --nnodes 1 --nproc-per-node 2" in done.stderr
    assert "'output=my runs'" in done.stderr
    assert runner.calls == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--rendezvous", "a:29500"], "--rdzv-backend c10d --rdzv-endpoint a:29500 --rdzv-id tiny-random"),
        (["--rendezvous", "a:29500", "--node-rank", "1"], "--node-rank 1 --master-addr a --master-port 29500"),
    ],
)
def test_machines_meet_where_they_are_told(runner: Any, torchrun: list[list[str]], options: list[str], expected: str) -> None:
    done = qwha("run", "tiny-random", "train.batch_size=4", "--gpus", "2", "--nodes", "2", *options, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert f"--nnodes 2 --nproc-per-node 2 {expected} -m qwha_cli run tiny-random" in " ".join(torchrun[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gpus", "2"], "2 GPUs asked for, 0 found"),
        (["--gpus", "3", "--device", "cpu"], "a batch of 2 sequences cannot be split evenly among 3 processes"),
        (["--gpus", "2", "--nodes", "2"], "2 machines need a place to meet"),
        (["--gpus", "2", "--nodes", "2", "--rendezvous", "node1"], "node1 is not HOST:PORT"),
        (["--gpus", "2", "--nodes", "2", "--rendezvous", "a:1", "--node-rank", "2"], "there is no machine 2 of 2"),
        (["--nodes", "2", "--rendezvous", "a:1"], "--nodes needs --gpus"),
        (["--gpus", "2", "--rendezvous", "a:1"], "belong to several machines"),
        (["--gpus", "2", "--device", "cuda:1"], "cuda:1 is one GPU, but there are 2 processes"),
    ],
)
def test_what_cannot_be_is_one_error_before_anything_starts(
    runner: Any, torchrun: list[list[str]], monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    done = qwha("train", "tiny-random", *options)
    assert done.exit_code == 2, done.stderr
    assert told in done.stderr
    assert done.stderr.count("error:") == 1
    assert torchrun == runner.calls == []


def test_one_gpu_is_this_process(runner: Any, torchrun: list[list[str]]) -> None:
    assert qwha("train", "tiny-random", "--gpus", "1").exit_code == 0
    assert (len(torchrun), len(runner.calls)) == (0, 1)


def under_torchrun(monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


def test_under_a_launcher_nothing_is_started_and_a_contradiction_is_refused(
    runner: Any, torchrun: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    under_torchrun(monkeypatch)
    assert qwha("train", "tiny-random").exit_code == 0
    assert qwha("train", "tiny-random", "--gpus", "2", "--nodes", "2", "--rendezvous", "a:1").exit_code == 0
    assert (len(torchrun), len(runner.calls)) == (0, 2)
    done = qwha("train", "tiny-random", "--gpus", "4")
    assert done.exit_code == 2
    assert "under a launcher that started 2 processes on each of 2 machines" in done.stderr
    assert len(runner.calls) == 2


def test_quantize_and_init_take_gpus_into_their_own_process(runner: Any, torchrun: list[list[str]]) -> None:
    for command in ("quantize", "init"):
        assert qwha(command, "tiny-random", "--gpus", "2").exit_code == 0
        assert runner.calls[-1]["options"].gpus == 2
    assert torchrun == []
    assert qwha("merge", "tiny-random", "--gpus", "2").exit_code == 2


def test_a_process_knows_its_place() -> None:
    assert own_ranks({}) == Ranks()
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    theirs = own_ranks(env | {"TORCHELASTIC_ERROR_FILE": "/t/run/attempt_0/1/error.json"})
    assert (theirs.rank, theirs.local_rank, theirs.first, theirs.ours) == (3, 1, False, False)
    assert theirs.failure == Path("/t/run/attempt_0/qwha-failure.json")
    ours = own_ranks(env | {FAILURE_FILE: "/t/failure.json"})
    assert (ours.ours, ours.failure) == (True, Path("/t/failure.json"))


def test_only_the_first_to_fail_speaks(tmp_path: Path) -> None:
    one, other = (Ranks(rank=rank, size=2, failure=tmp_path / "failure.json") for rank in (0, 1))
    assert one.claim_failure({"exit_code": 2})
    assert not other.claim_failure({"exit_code": 1}, patient=True)
    assert json.loads((tmp_path / "failure.json").read_text()) == {"exit_code": 2}
    assert Ranks().claim_failure({})


def test_the_code_of_the_first_failure_is_the_commands(
    runner: Any, torchrun: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: list[str]) -> None:
        Path(launch.os.environ[FAILURE_FILE]).write_text('{"exit_code": 130}')

    monkeypatch.setattr(launch, "_torchrun", fail)
    assert qwha("train", "tiny-random", "--gpus", "2", "--device", "cpu").exit_code == 130


def test_launch_is_wanted_for_several_processes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert [Launch(gpus).wanted for gpus in (None, 1, 2)] == [False, False, True]


def test_torchrun_is_told_how_long_to_wait_where_it_can_be() -> None:
    old, new = argparse.ArgumentParser(), argparse.ArgumentParser()
    for parser in (old, new):
        parser.add_argument("--signals-to-handle")
    new.add_argument("--shutdown-timeout", type=int)
    assert vars(old.parse_args(stopping(old))) == {"signals_to_handle": "SIGINT"}
    assert vars(new.parse_args(stopping(new))) == {"signals_to_handle": "SIGINT", "shutdown_timeout": 600}
