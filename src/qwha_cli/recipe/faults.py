"""From pydantic's errors to problems a person can act on: the place in the file, what was expected, the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qwha_cli.catalog import nearest
from qwha_cli.errors import Problem
from qwha_cli.recipe.keys import Path, dotted_name, suggest
from qwha_cli.recipe.positions import Node, locate
from qwha_cli.recipe.section import COMBINATION, UNKNOWN_NAME, Fault

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "string_too_short": "text that is not empty",
}


def problems_of(error: ValidationError, *, tree: Node) -> list[Problem]:
    """Return every fault of a validation with its place.

    Args:
        error: What pydantic found.
        tree: The recipe as read, with places.
    """
    return [problem for detail in error.errors(include_url=False) for problem in _problems(detail, tree)]


def unknown_keys(error: ValidationError) -> list[Path]:
    """Return the paths of the keys that the schema does not have."""
    return [tuple(detail["loc"]) for detail in error.errors(include_url=False) if detail["type"] == "extra_forbidden"]


def in_reading_order(problems: Iterable[Problem]) -> list[Problem]:
    """Return problems each once, by file, line and column; overrides last."""

    def order(problem: Problem) -> tuple[bool, str, int, int]:
        match = re.fullmatch(r"(.*):(\d+):(\d+)", problem.where)
        name, line, column = (match[1], int(match[2]), int(match[3])) if match else (problem.where, 0, 0)
        return problem.where.startswith("override "), name, line, column

    return sorted({str(problem): problem for problem in problems}.values(), key=order)


def _problems(detail: ErrorDetails, tree: Node) -> list[Problem]:
    path: Path = tuple(detail["loc"])
    if detail["type"] == COMBINATION:
        faults: Sequence[Fault] = detail.get("ctx", {})["faults"]
        return [_at_fault(fault, path, tree) for fault in faults]
    node, depth = locate(tree, path)
    dotted = dotted_name(path[:depth])
    if detail["type"] == "extra_forbidden":
        hint = suggest(path)
        return [Problem(node.key_where, f"unknown key {dotted_name(path)}", f"did you mean {hint}?" if hint else None)]
    if detail["type"] == "missing":
        return [Problem(node.key_where, f"{dotted_name(path)} is required")]
    message, hint = _message(detail)
    # an override's place is its key already
    prefix = "" if not dotted or node.where == f"override {dotted}" else f"{dotted}: "
    return [Problem(node.where, prefix + message, hint)]


def _at_fault(fault: Fault, section: Path, tree: Node) -> Problem:
    path = (*section, *fault.path)
    node, depth = locate(tree, path)
    # A key that was not written (a default) has no place: point at the section that lacks it.
    where = node.where if depth == len(path) and fault.path else node.key_where
    return Problem(where, f"{dotted_name(path)}: {fault.message}", fault.hint)


def _message(detail: ErrorDetails) -> tuple[str, str | None]:
    """Return what is wrong with a value, and a hint."""
    context: Mapping[str, Any] = detail.get("ctx", {})
    kind, value = detail["type"], detail["input"]
    got = f"got {show(value)}"
    if kind == "literal_error":
        choices = [part.strip().strip("'") for part in str(context["expected"]).replace(" or ", ", ").split(",")]
        close = nearest(str(value), choices)
        return f"expected {' or '.join(choices)}, {got}", f"did you mean {close}?" if close and isinstance(value, str) else None
    if kind == UNKNOWN_NAME:
        return str(detail["msg"]), f"did you mean {context['nearest']}?" if context.get("nearest") else None
    if kind == "value_error":
        return str(context["error"]), None
    if kind in _EXPECTED:
        quoted = kind == "string_type" and isinstance(value, int | float)
        return f"expected {_EXPECTED[kind]}, {got}", "write it in quotes" if quoted else None
    bounds: dict[str, Callable[[], str]] = {
        "greater_than_equal": lambda: f"at least {context['ge']}",
        "greater_than": lambda: f"above {context['gt']}",
        "less_than_equal": lambda: f"at most {context['le']}",
        "less_than": lambda: f"below {context['lt']}",
        "too_short": lambda: "at least one entry",
    }
    if kind in bounds:
        return f"must be {bounds[kind]()}, {got}" if kind != "too_short" else f"needs {bounds[kind]()}", None
    return f"{detail['msg']}, {got}", None


def show(value: object) -> str:
    """Return a value in a few characters, as YAML would write it."""
    words = {True: "true", False: "false", None: "null"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, str):
        return f'the text "{value}"' if len(value) <= 60 else f'the text "{value[:57]}..."'
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else str(value)
