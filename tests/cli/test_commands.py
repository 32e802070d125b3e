"""Every command: what it calls, what it prints where, and which exit code it leaves with."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qwha_cli.artifacts.manifest import Manifest
from qwha_cli.artifacts.store import drafting, publish
from qwha_cli.cli.app import app
from qwha_cli.errors import (
    ArtifactError,
    DataError,
    GateError,
    Interrupted,
    KernelError,
    ModelError,
    NumericsError,
    QwhaError,
    ResourceError,
    UsageError,
)
from qwha_cli.recipe.load import load_recipe
from qwha_cli.recipe.shipped import list_shipped


def qwha(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("command", ["quantize", "init", "train", "eval", "merge", "run"])
def test_a_stage_command_runs_stages_up_to_its_own(runner: Any, command: str) -> None:
    done = qwha(command, "tiny-random", "train.lr=2e-4", "--seed", "5", "--device", "cpu", "--output", "out: put")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert runner.calls[0]["until"] == (None if command == "run" else command)
    recipe = runner.recipe
    assert (recipe.train.lr, recipe.seed, recipe.model.device, recipe.output) == (2e-4, 5, "cpu", "out: put")
    assert "train.lr=2e-4" in done.stderr
    assert "recipe.resolved.yaml" in done.stderr


def test_json_is_one_object_on_stdout(runner: Any) -> None:
    runner.table = [{"row": "base", "perplexity_text": float("inf"), "exact_match": 0.25}]
    done = qwha("run", "tiny-random", "--json")
    printed = json.loads(done.stdout)
    assert set(printed) == {"run", "stages", "table"}
    assert printed["table"] == [{"row": "base", "perplexity_text": None, "exact_match": 0.25}]
    assert "25.0" in done.stderr


@pytest.fixture
def initialised(runner: Any, tmp_path: Path) -> Any:
    """A runner whose init stage has left two layers."""
    runner.init = tmp_path / "2-init"
    runner.init.mkdir()
    records = [
        {"name": f"l.{i}.up", "block": i, "projection": "up", "error_zero": 0.02, "error_after": 0.01, "compare": {"cloq": 0.015}}
        for i in range(2)
    ]
    (runner.init / "layers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return runner


def test_json_carries_what_an_initialisation_won(initialised: Any) -> None:
    told = json.loads(qwha("init", "tiny-random", "--json").stdout)
    assert set(told) == {"run", "stages", "table", "initialisation"}
    won = told["initialisation"]
    assert (won["method"], won["layers"], won["error_recovered"]) == ("pursuit", 2, 0.5)
    assert won["compare"]["cloq"]["layer_error_mean"] == 0.015
    assert won["verdict"]["level"] == "good"


def test_a_fresh_init_is_told_again_when_it_was_asked_for(initialised: Any) -> None:
    total = "mean layer error 0.0200 (zero) → 0.0100 (pursuit), 50 % recovered; CLoQ at the same bytes 0.0150"
    assert total not in qwha("init", "tiny-random").stderr  # made now: its own events have told it
    initialised.fresh = True
    done = qwha("init", "tiny-random")
    assert done.stdout == ""
    assert total in done.stderr
    assert "verdict  a good start." in done.stderr
    assert total not in qwha("train", "tiny-random").stderr


def test_only_run_writes_the_report_and_only_when_something_is_new(runner: Any) -> None:
    assert qwha("train", "tiny-random").exit_code == 0
    assert runner.reports == []
    qwha("run", "tiny-random")
    assert runner.reports == [Path("runs/tiny-random")]
    runner.fresh = True
    Path("runs/tiny-random").mkdir(parents=True)
    Path("runs/tiny-random/report.html").write_text("x")
    assert "report.html" in qwha("run", "tiny-random").stderr
    assert len(runner.reports) == 1


def test_force_and_verify_reach_the_runner(runner: Any) -> None:
    qwha("train", "tiny-random", "--force", "--verify")
    assert runner.calls[-1]["options"].force == ("train",)
    assert runner.calls[-1]["options"].deep_verify
    qwha("run", "tiny-random", "--force")
    assert runner.calls[-1]["options"].force == ("quantize", "init", "train", "eval", "merge")
    assert not runner.calls[-1]["options"].deep_verify


def test_under_torchrun_only_the_first_rank_speaks(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = qwha("run", "tiny-random", "--json")
    assert (done.exit_code, done.output) == (0, "")
    assert runner.reports == []


ERRORS = [
    (ArtifactError("broken", where="runs/x", remedy="delete it"), 1, "artifact"),
    (DataError("no data"), 1, "data"),
    (GateError("a layer got worse"), 1, "gate"),
    (KernelError("no kernel"), 1, "kernel"),
    (ModelError("no model"), 1, "model"),
    (NumericsError("NaN"), 1, "numerics"),
    (ResourceError("no memory"), 1, "resource"),
    (UsageError("bad"), 2, "usage"),
    (Interrupted("stopped"), 130, "interrupted"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 1, "resource"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 1, "resource"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "resource"),
    (ZeroDivisionError("division by zero"), 1, "bug"),
]


@pytest.mark.parametrize(("error", "exit_code", "code"), ERRORS, ids=[f"{type(e).__name__}-{c}" for e, _, c in ERRORS])
def test_an_error_is_a_few_lines_and_an_exit_code(runner: Any, error: BaseException, exit_code: int, code: str) -> None:
    runner.error = error
    done = qwha("train", "tiny-random")
    assert done.exit_code == exit_code
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 4
    if isinstance(error, QwhaError):
        assert error.message in done.stderr
        assert f"remedy: {error.remedy}" in done.stderr or error.remedy is None
    if code == "bug":
        assert "ZeroDivisionError: division by zero" in done.stderr
        assert "bug in qwha" in done.stderr
    told = json.loads(qwha("train", "tiny-random", "--json").stdout)
    assert (told["error"]["code"], told["error"]["exit_code"]) == (code, exit_code)


def test_an_error_of_torch_memory_is_known_by_its_class(runner: Any) -> None:
    runner.error = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})(
        "CUDA out of memory. Tried to allocate 2 GiB"
    )
    done = qwha("train", "tiny-random")
    assert done.exit_code == 1
    assert "lower train.batch_size" in done.stderr


def test_debug_shows_the_traceback_and_keeps_the_exit_code(runner: Any) -> None:
    runner.error = UsageError("bad")
    done = qwha("train", "tiny-random", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "error: bad" in done.stderr


def test_a_bad_recipe_exits_2_with_every_fault(runner: Any) -> None:
    Path("bad.yaml").write_text("name: bad\nmodel: {idd: x}\n")
    done = qwha("run", "bad.yaml", "--json")
    assert done.exit_code == 2
    assert runner.calls == []
    for place in ("bad.yaml:2:1: model.id is required", "bad.yaml:2:9: unknown key model.idd (did you mean model.id?)"):
        assert place in done.stderr.splitlines()
    problems = json.loads(done.stdout)["error"]["problems"]
    assert {"where": "bad.yaml:1:1", "message": "quantize is required", "hint": None} in problems


@pytest.mark.parametrize(
    "arguments",
    [["runn"], ["run"], ["run", "tiny-random", "--sed", "1"], ["run", "tiny-random", "--seed", "x"], ["recipes", "lss"]],
)
def test_a_wrong_command_line_exits_2(runner: Any, arguments: list[str]) -> None:
    done = qwha(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert runner.calls == []


def make_run(name: str, published: list[str]) -> None:
    run = Path("runs") / name
    for number, stage in enumerate(published, start=1):
        with drafting(run / f"{number}-{stage}") as draft:
            publish(draft, run / f"{number}-{stage}", manifest=Manifest(stage=stage, key="k", settings={}, inputs={}))
    (run / "recipe.resolved.yaml").write_text(load_recipe("tiny-random", [f"name={name}"]).to_yaml())


def test_eval_without_a_recipe_takes_the_newest_run_and_names_it(runner: Any) -> None:
    make_run("old", ["quantize", "init"])
    make_run("new", ["quantize"])
    (Path("runs") / "unfinished").mkdir()
    done = qwha("eval", "--tasks", "gsm8k,arc_easy", "--limit", "7")
    assert done.exit_code == 0, done.stderr
    assert "newest run: runs/new" in done.stderr
    assert runner.calls[0]["until"] == "eval"
    assert runner.recipe.name == "new"
    assert [task.name for task in runner.recipe.eval.tasks] == ["gsm8k", "arc_easy"]
    assert runner.recipe.eval.limit == 7
    make_run("old", ["quantize", "init", "train"])
    assert qwha("eval", "eval.batch_size=3").exit_code == 0
    assert (runner.recipe.name, runner.recipe.eval.batch_size) == ("old", 3)


def test_eval_of_a_moved_run_stays_in_its_folder(runner: Any) -> None:
    make_run("first", ["quantize"])
    Path("runs/first").rename("runs/second")
    qwha("eval")
    assert (runner.recipe.output, runner.recipe.name) == ("runs", "second")


def test_eval_without_any_run_says_what_to_do(runner: Any) -> None:
    done = qwha("eval")
    assert done.exit_code == 2
    assert "name a recipe" in done.stderr


def test_recipes_ls_lists_them_all(tmp_path: Path) -> None:
    done = qwha("recipes", "ls")
    names = {recipe.name for recipe in list_shipped()}
    assert len(names) >= 10
    assert all(name in done.stdout for name in names)
    assert {entry["name"] for entry in json.loads(qwha("recipes", "ls", "--json").stdout)["recipes"]} == names


def test_recipes_show_prints_the_file_or_the_resolved_recipe(tmp_path: Path) -> None:
    shown = qwha("recipes", "show", "llama32-3b-2bit").stdout
    assert shown.startswith("# What it does: ")
    resolved = qwha("recipes", "show", "llama32-3b-2bit", "--resolved").stdout
    (tmp_path / "r.yaml").write_text(resolved)
    assert load_recipe(tmp_path / "r.yaml") == load_recipe("llama32-3b-2bit")
    assert json.loads(qwha("recipes", "show", "llama32-3b-2bit", "--json").stdout)["recipe"]["train"]["lr"] == 2e-4


def test_recipes_cp_copies_and_never_overwrites_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert qwha("recipes", "cp", "tiny-random").exit_code == 0
    assert load_recipe("tiny-random.yaml").name == "tiny-random"
    Path("tiny-random.yaml").write_text("mine")
    done = qwha("recipes", "cp", "tiny-random")
    assert done.exit_code == 2
    assert Path("tiny-random.yaml").read_text() == "mine"
    assert qwha("recipes", "cp", "tiny-random", "--force").exit_code == 0
    assert qwha("recipes", "cp", "tiny-random", "deep/er.yaml", "--json").exit_code == 0
    assert Path("deep/er.yaml").is_file()


def test_recipes_keys_prints_a_section(tmp_path: Path) -> None:
    keys = json.loads(qwha("recipes", "keys", "train.data", "--json").stdout)["keys"]
    assert [key["name"] for key in keys] == [
        f"train.data{x}" for x in ("", ".format", ".path", ".split", ".limit", ".mask_prompt")
    ]
    assert qwha("recipes", "keys", "nothing").exit_code == 2
    assert "train.lr" in qwha("recipes", "keys").stdout


def test_validate_says_yes_or_tells_every_fault(tmp_path: Path) -> None:
    done = qwha("validate", "tiny-random", "train.lr=1e-4", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["recipe"]["train"]["lr"] == 1e-4
    assert "is a valid recipe" in done.stderr
    assert qwha("validate", "tiny-random", "train.lr=x").exit_code == 2


def test_report_writes_and_names_both_files(runner: Any) -> None:
    Path("runs/mine").mkdir(parents=True)
    done = qwha("report", "mine", "--json")
    assert done.exit_code == 0
    assert runner.reports == [Path("runs/mine")]
    assert json.loads(done.stdout)["html"] == "runs/mine/report.html"
    assert qwha("report", "yours").exit_code == 2


@pytest.mark.parametrize(
    "command",
    [
        *("run", "quantize", "init", "train", "eval", "merge"),
        *("validate", "report", "doctor", "recipes ls", "recipes show", "recipes cp", "recipes keys"),
    ],
)
def test_every_command_has_help_with_an_example_and_the_shared_options(command: str) -> None:
    done = qwha(*command.split(), "--help")
    assert done.exit_code == 0
    assert f"Example: qwha {command}" in done.stdout
    assert "--json" in done.stdout
    assert "--debug" in done.stdout


def test_the_root_help_names_the_exit_codes() -> None:
    text = " ".join(qwha("--help").stdout.split())
    assert "0 ok, 1 failed or a gate said no, 2 usage or recipe error, 130 interrupted" in text
    assert qwha("--version").stdout.startswith("qwha ")
