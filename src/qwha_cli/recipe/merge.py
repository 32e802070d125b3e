"""Laying one recipe over another: mappings merge key by key, everything else is replaced, and every value keeps its place.

Two rules go beyond that. Keys of which a recipe has exactly one (`epochs`, `steps`) replace each other, so that a run can be
shortened by `train.steps=10` alone. A string that is short for a mapping (`data: gsm8k`) replaces a mapping, but is expanded when
single keys are laid over it (`train.data.path=...`).
"""

from __future__ import annotations

from collections.abc import Sequence

from qwha_cli.recipe.positions import Node

Path = tuple[str, ...]

EXCLUSIVE: dict[Path, frozenset[str]] = {("train",): frozenset({"epochs", "steps"})}
SHORTHANDS: dict[Path, str] = {("train", "data"): "format"}


def merge(base: Node, over: Node, *, path: Path = ()) -> Node:
    """Return `base` with `over` laid on top; neither is changed.

    Args:
        base: The lower layer.
        over: The upper layer, which wins.
        path: Where in the recipe both stand.
    """
    if not isinstance(over.value, dict):
        return over
    lower = _expanded(base, path)
    if not isinstance(lower.value, dict):
        return over
    merged = dict(lower.value)
    chosen = EXCLUSIVE.get(path, frozenset()) & {key for key, node in over.value.items() if node.value is not None}
    if chosen:
        for key in EXCLUSIVE[path] - chosen:
            merged.pop(key, None)
    for key, node in over.value.items():
        merged[key] = merge(merged[key], node, path=(*path, key)) if key in merged else node
    placed = lower if over.implied else over
    return Node(merged, placed.where, placed.key_where, implied=placed.implied)


def nested(path: Sequence[str], value: Node) -> Node:
    """Return the tree in which `value` stands at `path` and nothing else; every node has the value's place."""
    node = value
    for key in reversed(path):
        node = Node({key: node}, value.where, implied=True)
    return node


def _expanded(node: Node, path: Path) -> Node:
    if path in SHORTHANDS and isinstance(node.value, str):
        return Node({SHORTHANDS[path]: Node(node.value, node.where)}, node.where, node.key_where)
    return node
