"""YAML with places: what scalars mean, where values stand, and what is refused."""

from __future__ import annotations

import pytest

from qwha_cli.recipe.positions import locate, parse, resolve_scalar


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("1e-4", 1e-4),
        ("2E-4", 2e-4),
        ("1e+3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("0755", 755),  # YAML 1.1 would read it as octal
        ("true", True),
        ("no", "no"),  # YAML 1.1 would read it as false
        ("12:30:00", "12:30:00"),  # YAML 1.1 would read it as base 60
        ("null", None),
        ("~", None),
        ("", None),
        ("nan", "nan"),
        ("1e", "1e"),
        ("q_proj", "q_proj"),
    ],
)
def test_a_plain_scalar_means_what_yaml_1_2_says(text: str, meaning: object) -> None:
    found = resolve_scalar(text)
    assert found == meaning
    assert type(found) is type(meaning)


def test_quoted_scalars_and_blocks_stay_text() -> None:
    node, problems = parse("a: '12'\nb: \"true\"\nc: |\n  3\n", name="f.yaml")
    assert not problems
    assert node is not None
    assert node.plain() == {"a": "12", "b": "true", "c": "3\n"}


def test_every_value_knows_its_file_line_and_column() -> None:
    node, _ = parse("train:\n  lr: 1e-4\nlist: [1, {x: 2}]\n", name="f.yaml")
    assert node is not None
    value, depth = locate(node, ("train", "lr"))
    assert (value.value, value.where, value.key_where, depth) == (1e-4, "f.yaml:2:7", "f.yaml:2:3", 2)
    assert locate(node, ("list", 1, "x"))[0].where == "f.yaml:3:15"
    nearest, depth = locate(node, ("train", "absent", "deeper"))
    assert (nearest.key_where, depth) == ("f.yaml:1:1", 1)


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3:1", "a stands twice"),
        ("a: &x 1\nb: *x\n", "f:1:4", "anchors and aliases"),
        ("a: &x [*x]\n", "f:1:4", "anchors and aliases"),
        ("a: !!python/name:os.system x\n", "f:1:4", "tag"),
        ("a: !mine x\n", "f:1:4", "tag"),
        ("[a]: 1\n", "f:1:1", "single word"),
        ("a: [1\nb: 2\n", "f:2:2", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "f:2:1", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "f:2:1", "not valid YAML"),
        ("a: \x00", "f", "not valid YAML"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_place(text: str, where: str, message: str) -> None:
    _, problems = parse(text, name="f")
    assert [p.where for p in problems] == [where]
    assert message in problems[0].message
