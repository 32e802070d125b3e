"""The list of keys: complete, documented, and the source of suggestions."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwha_cli.recipe.keys import list_keys, suggest
from qwha_cli.recipe.load import load_recipe

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def test_every_key_stands_in_the_document_with_type_default_and_meaning() -> None:
    lines = [
        line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `") and line.count(" | ") == 3
    ]
    documented = {line for line in lines if not line.startswith("| `quantize.method: ")}
    keys = list(list_keys())
    assert len(keys) > 70
    assert {f"| `{k.name}` | {k.type} | {k.default} | {k.meaning} |" for k in keys} == documented


def test_the_list_has_every_key_of_a_resolved_recipe() -> None:
    def names(value: object, prefix: str) -> set[str]:
        if not isinstance(value, dict):
            return {prefix}
        return {prefix}.union(*(names(item, f"{prefix}.{key}") for key, item in value.items()))

    dumped = load_recipe("tiny-random").dump()
    found = {name for key, value in dumped.items() for name in names(value, key)}
    assert found <= {key.name for key in list_keys()}


def test_every_key_has_a_meaning() -> None:
    assert [key.name for key in list_keys() if not key.meaning.endswith(".")] == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("train", "lrr"), "train.lr"),
        (("quantize", "lr"), "train.lr"),
        (("adapter", "samples"), "quantize.calibration.samples"),
        (("quantize", "samples"), "quantize.calibration.samples"),
        (("trian",), "train"),
        (("rank",), "adapter.rank"),
        (("eval", "tasks", 0, "shot"), "eval.tasks[0].shots"),
        (("train", "zzzzzzzzzz"), None),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(path: tuple[str | int, ...], expected: str | None) -> None:
    assert suggest(path) == expected
