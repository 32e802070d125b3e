"""What is read from a run folder, and what is said about what is missing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qwha_cli.artifacts.manifest import read_manifest
from qwha_cli.errors import ArtifactError
from qwha_cli.report.collect import STAGE_FOLDERS, collect
from qwha_cli.report.table import table_rows
from support.run_folder import make_run, sample


def test_a_finished_run_has_every_row_with_its_own_numbers(tmp_path: Path) -> None:
    report = collect(make_run(tmp_path / "demo", blocks=3))
    assert report.missing == ()
    assert report.stale == {}
    assert [row.row for row in report.table] == ["16-bit", "base", "init", "trained", "merged"]
    by_name = {row.row: row for row in report.table}
    assert by_name["base"].perplexity_answers == 31.7
    assert by_name["trained"].exact_match == 0.44
    assert by_name["trained"].n == 200
    assert by_name["16-bit"].seconds is None
    assert by_name["init"].layer_error == 0.025
    assert by_name["trained"].layer_error is None
    assert by_name["base"].tasks[0].task == "arc_easy"
    assert len(report.initialised) == 21


def test_the_adapter_is_counted_in_bits_and_megabytes(tmp_path: Path) -> None:
    rows = {row.row: row for row in collect(make_run(tmp_path / "demo", blocks=2)).table}
    assert rows["base"].bits_per_weight == 2.28
    assert rows["trained"].bits_per_weight == pytest.approx(2.28 + 24_000 * 8 / 212_336)
    assert rows["trained"].megabytes == pytest.approx(0.084)
    assert rows["merged"].megabytes == pytest.approx(0.4247)
    assert rows["merged"].bits_per_weight == 16.0


def test_missing_stages_are_named_and_leave_no_rows(tmp_path: Path) -> None:
    report = collect(make_run(tmp_path / "half", stages=("quantize", "init"), blocks=2))
    assert report.missing == ("train", "eval", "merge")
    assert [row.row for row in report.table] == ["16-bit", "base", "init"]
    assert report.table[1].perplexity_answers is None
    assert report.metrics == ()
    assert report.samples == ()


def test_a_run_with_only_a_recipe_is_a_run_with_nothing_done(tmp_path: Path) -> None:
    report = collect(make_run(tmp_path / "new", stages=()))
    assert report.missing == tuple(STAGE_FOLDERS)
    assert report.table == ()


def test_a_folder_without_a_run_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run here") as caught:
        collect(tmp_path)
    assert caught.value.remedy is not None
    assert "qwha run" in caught.value.remedy


def test_a_stage_made_from_another_version_of_its_input_is_stale_and_so_is_all_after_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", blocks=2)
    manifest = read_manifest(run / "2-init")
    assert manifest is not None
    (run / "2-init" / "manifest.json").write_text(dataclasses.replace(manifest, key="0" * 64).to_json(), encoding="utf-8")
    stale = collect(run).stale
    assert stale["train"] == ("init",)
    assert stale["merge"] == ("train",)
    assert set(stale["eval"]) == {"init", "train", "merge"}
    assert "init" not in stale


@pytest.mark.parametrize(
    ("file", "content", "place"),
    [
        ("2-init/layers.jsonl", '{"a": 1}\nnot json\n', "layers.jsonl:2"),
        ("2-init/layers.jsonl", "[1]\n", "layers.jsonl:1"),
        ("4-eval/scores.json", '{"rows": 3}', "scores.json"),
        ("5-merge/check.json", "[", "check.json"),
        ("4-eval/samples/base-exact_match.jsonl", "[", "base-exact_match.jsonl"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str, place: str) -> None:
    run = make_run(tmp_path / "demo", blocks=2)
    (run / file).write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        collect(run)
    assert str(caught.value.where).endswith(place)


def test_answers_of_all_rows_stand_beside_one_question(tmp_path: Path) -> None:
    samples = collect(make_run(tmp_path / "demo", blocks=2)).samples
    assert len(samples) == 8
    assert [answer.row for answer in samples[0].answers] == ["16-bit", "base", "init", "trained", "merged"]
    assert [answer.correct for answer in samples[1].answers] == [False, False, False, True, True]
    assert samples[0].expected == "7"


def test_harness_samples_are_understood_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", blocks=2)
    record = {"doc": {"question": "Why?"}, "target": "because", "filtered_resps": [["so"]], "acc": 0.0}
    (run / "4-eval" / "samples" / "base-task-gsm8k.jsonl").write_text(json.dumps(record), encoding="utf-8")
    found = [s for s in collect(run).samples if s.measurement == "task-gsm8k"]
    assert [(s.question, s.expected, s.answers[0].text, s.answers[0].correct) for s in found] == [
        ("Why?", "because", "so", False)
    ]


def test_likelihoods_are_no_answers_to_show(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", blocks=2)
    record = {"doc": {"question": "Which?"}, "target": 1, "filtered_resps": [[-3.2, False], [-1.0, True]], "acc": 1.0}
    (run / "4-eval" / "samples" / "base-task-arc_easy.jsonl").write_text(json.dumps(record), encoding="utf-8")
    assert {s.measurement for s in collect(run).samples} == {"exact_match"}


def test_two_filters_of_one_metric_stay_two_scores(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", blocks=2)
    path = run / "4-eval" / "scores.json"
    scores = json.loads(path.read_text(encoding="utf-8"))
    kinds = {"strict-match": 0.2, "flexible-extract": 0.3}
    scores["rows"][1]["task:gsm8k"] = [
        {"task": "gsm8k", "metric": "exact_match", "filter": name, "value": value, "stderr": None}
        for name, value in kinds.items()
    ]
    path.write_text(json.dumps(scores), encoding="utf-8")
    found = {task.measure: task.value for task in collect(run).table[1].tasks if task.task == "gsm8k"}
    assert found == {"exact_match, strict-match": 0.2, "exact_match, flexible-extract": 0.3}


def test_a_question_asked_twice_keeps_its_first_answer(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", blocks=2)
    path = run / "4-eval" / "samples" / "base-exact_match.jsonl"
    path.write_text(json.dumps(sample(0, "base")) + "\n" + json.dumps(sample(0, "trained")) + "\n", encoding="utf-8")
    first = collect(run).samples[0]
    assert [a.row for a in first.answers].count("base") == 1
    assert first.answers[1].correct is False


def test_a_score_that_was_not_measured_is_none_and_not_zero(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", blocks=2)
    manifests = {stage: m for stage, folder in STAGE_FOLDERS.items() if (m := read_manifest(run / folder)) is not None}
    folders = {stage: run / folder for stage, folder in STAGE_FOLDERS.items()}
    rows = table_rows(folders, manifests, scores={"base": {"row": "base", "exact_match": True}})
    assert all(row.perplexity_answers is None and row.exact_match is None for row in rows)
