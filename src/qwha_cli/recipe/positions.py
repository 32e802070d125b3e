"""YAML with a place for every value: text in, a tree of nodes out, each knowing its `file:line:column`.

The grammar is PyYAML's safe subset; the meaning of plain scalars is YAML 1.2's core schema, so `1e-4` is a number and `no` is
text (PyYAML alone reads YAML 1.1, where it is the other way round). Duplicate keys, anchors, tags and keys that are not text are
faults. This file knows no schema.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from qwha_cli.errors import Problem

Scalar = str | int | float | bool | None

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NULLS: dict[str, Scalar] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_WORDS: dict[str, Scalar] = {**_NULLS, "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# What PyYAML gives to values without a tag; our own reading of plain scalars replaces its.
_PLAIN_TAGS = frozenset({"null", "bool", "int", "float", "str", "seq", "map", "timestamp", "value", "merge"})


@dataclass
class Node:
    """A value of a recipe and its place.

    Attributes:
        value: A scalar, a list of nodes, or a mapping of nodes.
        where: Place of the value, `file:line:column` (both from 1) or `override KEY`.
        key_where: Place of the key that names the value; the value's own place in a list or at the root.
        implied: Nobody wrote this mapping: it only carries an override's dotted key.
    """

    value: Scalar | list[Node] | dict[str, Node]
    where: str
    key_where: str = ""
    implied: bool = False

    def __post_init__(self) -> None:
        self.key_where = self.key_where or self.where

    def plain(self) -> object:
        """The value without places, as plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def resolve_scalar(text: str) -> Scalar:
    """Return what a plain (unquoted) scalar means: null, true or false, a number, else text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def parse(text: str, *, name: str, fixed_where: str | None = None) -> tuple[Node | None, list[Problem]]:
    """Parse one YAML document.

    Args:
        text: The document.
        name: The file's name in places.
        fixed_where: Give every node this place instead (command-line overrides have no lines).

    Returns:
        The tree, or None where the text is empty or no YAML; and every fault found.
    """
    reader = _Reader(name, fixed_where)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ": ".join(part for part in (error.context, error.problem) if part)
        return None, [Problem(reader.place(mark), f"not valid YAML: {what}")]
    except yaml.YAMLError as error:
        return None, [Problem(fixed_where or name, f"not valid YAML: {str(error).splitlines()[0]}")]
    return (reader.build(root) if root is not None else None), reader.problems


def locate(root: Node, path: Sequence[str | int]) -> tuple[Node, int]:
    """Follow keys and indices as far as the tree goes; return the last node reached and how many steps were taken."""
    node = root
    for depth, step in enumerate(path):
        if isinstance(node.value, dict) and step in node.value:
            node = node.value[str(step)]
        elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
        else:
            return node, depth
    return node, len(path)


class _Reader:
    """Turns PyYAML's node graph into ours and collects the faults it meets."""

    def __init__(self, name: str, fixed_where: str | None) -> None:
        self.name = name
        self.fixed_where = fixed_where
        self.problems: list[Problem] = []
        self._seen: set[int] = set()

    def place(self, mark: yaml.Mark | None) -> str:
        if self.fixed_where is not None:
            return self.fixed_where
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}" if mark else self.name

    def build(self, node: yaml.Node) -> Node:
        where = self.place(node.start_mark)
        if id(node) in self._seen:  # PyYAML returns one object for an anchor and its aliases, even for a cycle
            self.problems.append(Problem(where, "anchors and aliases are not supported", "share settings with `extends:`"))
            return Node(None, where)
        self._seen.add(id(node))
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
            self.problems.append(Problem(where, f"the tag {node.tag} is not supported"))
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node), where)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.build(item) for item in node.value], where)
        assert isinstance(node, yaml.ScalarNode)  # the third and last kind
        text = str(node.value)
        return Node(resolve_scalar(text) if node.style is None else text, where)  # style None: not quoted, not a block

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key_where = self.place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(key_where, "a key must be a single word"))
                continue
            key = str(key_node.value)
            if key in found:
                self.problems.append(Problem(key_where, f"the key {key} stands twice", f"first at {found[key].key_where}"))
            value = self.build(value_node)
            value.key_where = key_where
            found[key] = value
        return found
