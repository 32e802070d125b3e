"""`qwha eval --tasks` scores lm-eval's real tasks from local files, on the newest run when no recipe is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwha_cli.cli.app import app


@pytest.mark.slow
def test_tasks_of_lm_eval_on_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problems = [{"question": f"What is {n} plus 1?", "answer": f"It is {n} + 1 = {n + 1}.\n#### {n + 1}"} for n in range(8)]
    (tmp_path / "gsm.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    science = [
        {"id": str(n), "question": f"Which is {n}?", "choices": {"text": [str(n), "none"], "label": ["A", "B"]}, "answerKey": "A"}
        for n in range(8)
    ]
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(p) + "\n" for p in science))
    assert CliRunner().invoke(app, ["quantize", "tiny-random"]).exit_code == 0
    files = {"gsm8k": {"test": "gsm.jsonl", "train": "gsm.jsonl"}, "arc_easy": {"test": "arc.jsonl"}}
    overrides = [f"eval.data={json.dumps(files)}", "eval.rows=[base]", "eval.answers=null", "eval.perplexity=null"]
    tasks = "eval.tasks=[{name: gsm8k, shots: 1}, arc_easy]"
    result = CliRunner().invoke(app, ["eval", *overrides, tasks, "--limit", "4", "--json"])
    assert result.exit_code == 0, result.output
    assert "newest run: runs/tiny-random" in result.stderr
    row = next(r for r in json.loads(result.stdout)["table"] if r["row"] == "base")
    assert set(row["tasks"]) == {"gsm8k", "arc_easy"}
    for scores in row["tasks"].values():
        assert all(score["n"] == 4 for score in scores)
        assert all(score["stderr"] is not None for score in scores)
    assert {score["shots"] for score in row["tasks"]["gsm8k"]} == {1}
    samples = list((tmp_path / "runs" / "tiny-random" / "4-eval" / "samples").glob("base-task-*.jsonl"))
    assert len(samples) == 2


def test_unknown_task_is_a_usage_error_with_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["eval", "tiny-random", "--tasks", "gsm8q", "eval.rows=[base]", "eval.answers=null"])
    assert result.exit_code == 2, result.output
    assert "gsm8k" in result.stderr
