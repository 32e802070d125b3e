"""lm-eval's tasks on a tiny model, with local data in the columns of the hub's data sets and no network."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from qwha_cli.catalog import TASKS
from qwha_cli.errors import DataError, UsageError
from qwha_cli.evaluation.harness import TaskRequest, TaskScore, run_tasks
from qwha_cli.evaluation.task_files import load_task, shipped_file
from support.tiny_model import tiny_llama, tiny_tokenizer

ARC = [
    {
        "id": f"q{i}",
        "question": f"What is {i} plus {i}?",
        "choices": {"text": [str(i), str(2 * i), str(3 * i + 1), "none"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    }
    for i in range(1, 5)
]
GSM8K = [
    {"question": f"Ann has {i} apples and buys 3. How many?", "answer": f"{i} + 3 = {i + 3}\n#### {i + 3}"} for i in range(4)
]
ROWS: dict[str, list[dict[str, object]]] = {
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "boolq": [
        {"question": f"is {i} even", "passage": "Even numbers end in 0, 2, 4.", "idx": i, "label": i % 2} for i in range(4)
    ],
    "gsm8k": GSM8K,
    "gsm8k_cot": GSM8K,
    "hellaswag": [
        {
            "ind": i,
            "activity_label": "Baking",
            "ctx_a": "A man takes [title] flour.",
            "ctx_b": "he",
            "ctx": "A man takes flour. he",
            "endings": ["bakes.", "flies.", "sings.", "sinks."],
            "source_id": f"s{i}",
            "split": "val",
            "split_type": "indomain",
            "label": str(i),
        }
        for i in range(4)
    ],
    "openbookqa": [
        {
            "id": str(i),
            "question_stem": "The sun is a",
            "choices": {"text": ["star", "cat", "sea", "hat"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        }
        for i in range(4)
    ],
    "piqa": [{"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Sing to it.", "label": i % 2} for i in range(4)],
    "winogrande": [
        {
            "sentence": f"The cup {i} did not fit the box as _ was big.",
            "option1": "cup",
            "option2": "box",
            "answer": str(1 + i % 2),
        }
        for i in range(4)
    ],
}
SCORED_SPLIT = {name: "validation" if name in {"boolq", "hellaswag", "piqa", "winogrande"} else "test" for name in ROWS}


def write(folder: Path, name: str, *splits: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for split in splits:
        path = folder / f"{name}-{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        found[split] = str(path)
    return found


def score(
    name: str, data: Mapping[str, str], *, shots: int | None = 0, limit: int | None = None, seed: int = 0
) -> tuple[list[TaskScore], list[dict[str, object]]]:
    model = tiny_llama(max_position_embeddings=4096)
    request = TaskRequest(name=name, shots=shots, limit=limit, data=data)
    return run_tasks(model, tiny_tokenizer(), [request], batch_size=4, seed=seed)


def test_every_task_of_the_catalogue_has_rows_here_and_a_file_in_lm_eval() -> None:
    assert ROWS.keys() == TASKS.keys()
    assert all(shipped_file(name).is_file() for name in TASKS)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_loads_its_local_data_with_its_own_functions(name: str, tmp_path: Path) -> None:
    data = write(tmp_path, name, SCORED_SPLIT[name])
    loaded = load_task(name, shots=0, data=data, seed=0, scratch=tmp_path / "scratch")
    assert len(list(loaded.task.eval_docs)) == 4
    loaded.task.build_all_requests(limit=None, rank=0, world_size=1)
    assert loaded.task.instances


@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "winogrande", "boolq"])
def test_choices_are_scored_with_everything_a_reader_needs(name: str, tmp_path: Path) -> None:
    data = write(tmp_path, name, SCORED_SPLIT[name])
    scores, samples = score(name, data)
    assert {s.metric for s in scores} == ({"acc"} if name in {"winogrande", "boolq"} else {"acc", "acc_norm"})
    for found in scores:
        assert (found.task, found.filter, found.n, found.shots, found.data) == (name, "none", 4, 0, data)
        assert type(found.value) is float
        assert found.value in {0.0, 0.25, 0.5, 0.75, 1.0}
        assert found.stderr is not None
        assert float(found.version) >= 1
        assert len(found.template_hash) == 64
    mean = sum(float(str(item["acc"])) for item in samples) / 4
    assert mean == next(s.value for s in scores if s.metric == "acc")
    json.dumps([samples, [dataclasses.asdict(s) for s in scores]])


def test_generated_answers_are_scored_by_every_filter(tmp_path: Path) -> None:
    scores, samples = score("gsm8k", write(tmp_path, "gsm8k", "test", "train"), shots=2, limit=2)
    assert {(s.metric, s.filter) for s in scores} == {("exact_match", "strict-match"), ("exact_match", "flexible-extract")}
    assert all(s.n == 2 and s.shots == 2 for s in scores)
    assert {item["task"] for item in samples} == {"gsm8k"}
    prompt = str(samples[0]["arguments"])
    assert prompt.count("Question:") >= 3
    assert "Ann has 0 apples" in prompt


def test_scores_are_the_same_twice_and_under_peft(tmp_path: Path) -> None:
    data = write(tmp_path, "piqa", "validation", "train")
    first, second = (score("piqa", data, shots=1, seed=3)[0] for _ in range(2))
    assert first == second
    model = get_peft_model(tiny_llama(max_position_embeddings=4096), LoraConfig(r=2, target_modules=["q_proj"]))
    request = TaskRequest(name="piqa", shots=1, limit=None, data=data)
    adapted, _ = run_tasks(model, tiny_tokenizer(), [request], batch_size=4, seed=3)
    assert adapted == first  # a fresh LoRA adds zero


def test_the_template_hash_changes_with_the_task_and_not_with_the_data(tmp_path: Path) -> None:
    hashes = {name: score(name, write(tmp_path, name, SCORED_SPLIT[name]))[0][0].template_hash for name in ("piqa", "openbookqa")}
    (tmp_path / "other").mkdir()
    assert score("piqa", write(tmp_path / "other", "piqa", "validation"))[0][0].template_hash == hashes["piqa"]
    assert len(set(hashes.values())) == 2


def test_nothing_is_drawn_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score("openbookqa", write(tmp_path, "openbookqa", "test"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_an_unknown_task_offers_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="unknown task 'gsm8'") as caught:
        score("gsm8", {})
    assert "did you mean gsm8k?" in str(caught.value.remedy)
    assert caught.value.exit_code == 2


def test_without_a_network_the_missing_data_are_said_in_seconds_with_the_recipe_key() -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match="openai/gsm8k on the hub") as caught:
        score("gsm8k", {})
    assert time.monotonic() - started < 20
    assert "eval.data.gsm8k.test" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("name", "splits", "shots", "message"),
    [
        ("gsm8k", ("train",), 0, r"eval\.data\.gsm8k\.test: .*no file is given"),
        ("gsm8k", ("test",), None, r"eval\.data\.gsm8k\.train: 5 shots need solved examples"),
        ("boolq", ("test",), 0, r"eval\.data\.boolq\.test: task boolq has no split 'test'"),
        ("boolq", ("validation",), 2, r"eval\.data\.boolq\.train: 2 shots"),
    ],
)
def test_missing_splits_are_named(name: str, splits: tuple[str, ...], shots: int | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        score(name, write(tmp_path, name, *splits), shots=shots)


def test_a_task_with_written_examples_needs_no_training_split(tmp_path: Path) -> None:
    loaded = load_task("gsm8k_cot", shots=None, data=write(tmp_path, "gsm8k_cot", "test"), seed=0, scratch=tmp_path / "scratch")
    assert loaded.task.config.num_fewshot == 8


def test_files_that_are_absent_or_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"eval\.data\.gsm8k\.test: there is no file"):
        score("gsm8k", {"test": str(tmp_path / "absent.jsonl")})
    odd = tmp_path / "rows.txt"
    odd.write_text("x")
    with pytest.raises(DataError, match=r"rows\.txt is none of"):
        score("gsm8k", {"test": str(odd)})
    (tmp_path / "rows.jsonl").write_text('{"text": "no question here"}\n')
    with pytest.raises(DataError, match="cannot be read as its items") as caught:
        score("arc_easy", {"test": str(tmp_path / "rows.jsonl")})
    assert "allenai/ai2_arc" in str(caught.value.remedy)


def test_real_gsm8k_is_read_in_place(tmp_path: Path, shared_data: Path) -> None:
    data = {"test": str(shared_data / "gsm8k" / "test.jsonl"), "train": str(shared_data / "gsm8k" / "train.jsonl")}
    loaded = load_task("gsm8k", shots=5, data=data, seed=0, scratch=tmp_path / "scratch")
    assert len(list(loaded.task.eval_docs)) == 1319
