"""The real entry point: light, quick, and with the exit codes it promises."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

QWHA = str(Path(sys.executable).with_name("qwha"))
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "lm_eval", "matplotlib", "numpy")


def run(*arguments: str, cwd: Path, command: tuple[str, ...] = (QWHA,)) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_importing_the_command_line_and_loading_a_recipe_import_nothing_heavy() -> None:
    code = "import sys, qwha_cli.cli.app\nfrom qwha_cli.recipe.load import load_recipe\nload_recipe('tiny-random')\n"
    code += f"print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_answers_within_half_a_second_of_processor_time(tmp_path: Path) -> None:
    # processor time, not wall time: the machine may be busy; the best of three, since the first may compile
    code = "import sys, time\nfrom qwha_cli.cli.app import main\nsys.argv = ['qwha', '--help']\n"
    code += "try:\n    main()\nexcept SystemExit:\n    print(time.process_time(), file=sys.stderr)"
    times = [float(run("-c", code, cwd=tmp_path, command=(sys.executable,)).stderr) for _ in range(3)]
    assert min(times) <= 0.5


@pytest.mark.parametrize("command", [(QWHA,), (sys.executable, "-m", "qwha_cli")], ids=["qwha", "python -m"])
def test_the_entry_points_answer(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = run("recipes", "ls", "--json", cwd=tmp_path, command=command)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["recipes"]) >= 10


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--version"], 0),
        (["validate", "tiny-random"], 0),
        (["validate", "tiny-random", "train.lrr=1"], 2),
        (["run", "nowhere.yaml"], 2),
        (["run", "--nonsense"], 2),
        (["eval"], 2),
        (["report", "nowhere"], 2),
    ],
)
def test_exit_codes_of_the_real_process(tmp_path: Path, arguments: list[str], exit_code: int) -> None:
    started = time.monotonic()
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{QWHA} recipes keys | head -n 1", shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


def test_ctrl_c_exits_130_with_a_line_and_no_traceback(tmp_path: Path) -> None:
    # the runner is replaced by one that waits: the signal, the boundary and the exit code are the real ones
    code = """
import signal, sys, time, types
# as in a terminal; a shell's background job, which the tests may be, is born deaf to it
signal.signal(signal.SIGINT, signal.default_int_handler)
runner = types.ModuleType("qwha_cli.stages.runner")
def run_stages(recipe, **options):
    print("waiting", flush=True)
    time.sleep(60)
runner.run_stages, runner.RunOptions = run_stages, lambda **options: None
sys.modules[runner.__name__] = runner
sys.argv = ["qwha", "run", "tiny-random"]
from qwha_cli.cli.app import main
main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: stopped" in errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
