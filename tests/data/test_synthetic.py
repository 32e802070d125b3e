from __future__ import annotations

import re
from random import Random

import pytest

from qwha_cli.data import synthetic
from qwha_cli.data.gsm8k import INSTRUCTION
from qwha_cli.data.word_problems import KINDS
from qwha_cli.errors import DataError

COMPUTATION = re.compile(r"(\d+) ([-+*/]) (\d+) = \$?(\d+)")


def _holds(left: str, sign: str, right: str, result: str) -> bool:
    a, b = int(left), int(right)
    return int(result) == {"+": a + b, "-": a - b, "*": a * b, "/": a // b if a % b == 0 else -1}[sign]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_step_is_right_and_the_last_one_gives_the_answer(kind: object) -> None:
    rng = Random(1)
    for _ in range(500):
        question, steps, answer = kind(rng)  # type: ignore[operator]
        assert answer >= 0
        assert 1 <= len(steps) <= 3
        found = [COMPUTATION.search(step) for step in steps]
        for step, match in zip(steps, found, strict=True):
            assert match is not None, step
            assert _holds(*match.groups()), step
        assert found[-1] is not None
        assert int(found[-1][4]) == answer
        assert question.endswith("?")
        assert len(question.split()) <= 34
        assert sum(len(step.split()) for step in steps) <= 34
        assert max(int(number) for number in re.findall(r"\d+", question + "".join(steps))) < 1000


def test_splits_share_no_problem_whatever_the_seeds() -> None:
    questions: dict[str, set[str]] = {split: set() for split in synthetic.DEFAULT_COUNT}
    for seed in range(3):
        for split in questions:
            examples = synthetic.read(None, split=split, seed=seed, limit=3000)
            assert len({example.prompt for example in examples}) == 3000
            questions[split] |= {example.prompt for example in examples}
    assert all(len(found) > 4000 for found in questions.values())
    assert not questions["train"] & questions["validation"]
    assert not questions["train"] & questions["test"]
    assert not questions["validation"] & questions["test"]
    for split, found in questions.items():
        assert {synthetic.split_of(question.removesuffix(INSTRUCTION)) for question in found} == {split}


def test_problems_depend_on_seed_split_and_nothing_else_and_a_larger_limit_only_adds() -> None:
    first = synthetic.read(None, split="train", seed=1, limit=50)
    assert synthetic.read(None, split="train", seed=1, limit=50) == first
    assert synthetic.read(None, split="train", seed=1, limit=80)[:50] == first
    assert synthetic.read(None, split="train", seed=2, limit=50) != first
    assert len(synthetic.read(None, split="train")) == 2000
    assert len(synthetic.read(None, split="test")) == 200


def test_problems_have_gsm8ks_form_and_all_kinds_occur() -> None:
    examples = synthetic.read(None, split="train", limit=400)
    assert all(example.prompt.endswith(INSTRUCTION) for example in examples)
    assert all(example.response.endswith(f"\nThe final answer is: {example.answer}") for example in examples)
    shapes = {re.sub(r"\d+", "", example.response.splitlines()[-2]).split()[0] for example in examples}
    assert len(shapes) >= 8
    assert len({example.answer for example in examples}) > 40  # numbers are small on purpose, but not a handful


def test_the_kinds_are_as_many_as_are_defined() -> None:
    from qwha_cli.data import word_problems

    defined = [
        value
        for name, value in vars(word_problems).items()
        if callable(value) and getattr(value, "__annotations__", {}).get("return") == "Problem"
    ]
    assert len(KINDS) == len(defined) == 16


def test_a_path_an_unknown_split_or_an_impossible_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="take no path"):
        synthetic.read("x.jsonl", split="train")
    with pytest.raises(DataError, match="'dev'"):
        synthetic.read(None, split="dev")
    monkeypatch.setattr(synthetic, "KINDS", (lambda rng: (f"{rng.randint(0, 20)}?", ["s"], 1),))
    with pytest.raises(DataError, match=r"only \d+ different problems found of 100 for train"):
        synthetic.read(None, split="train", limit=100)
