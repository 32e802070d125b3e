"""From a reference and overrides to a recipe, or to every fault at once.

Layers, lowest first: what `extends:` names (in order), the file itself, `key=value` overrides. Every value keeps its place
through the merge, so a fault points at the file, line and column that wrote it, or at the override. Paths of data inside a recipe
are taken relative to the current directory, those of `extends:` relative to the file that says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from qwha_cli.catalog import nearest
from qwha_cli.errors import Problem, RecipeError
from qwha_cli.recipe.faults import in_reading_order, problems_of, show, unknown_keys
from qwha_cli.recipe.merge import merge, nested
from qwha_cli.recipe.positions import Node, locate, parse
from qwha_cli.recipe.schema import Recipe
from qwha_cli.recipe.shipped import find, find_piece, list_pieces

EXTENDS = "extends"


def load_recipe(reference: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load, merge and check a recipe.

    Args:
        reference: A path, or the name of a shipped recipe.
        overrides: `dotted.key=value`, the value in YAML.

    Raises:
        RecipeError: With every fault found: unknown keys, wrong types, impossible combinations, files that are not there.
    """
    tree, problems = read_tree(find(reference))
    for text in overrides:
        over, faults = _override(text)
        problems += faults
        if over is not None:
            tree = merge(tree, over)
    recipe, faults = _validate(tree)
    problems += faults
    if recipe is None or problems:
        raise RecipeError(in_reading_order(problems), remedy="docs/recipes.md and `qwha recipes keys` list every key")
    return recipe


def read_tree(path: Path, *, seen: tuple[Path, ...] = ()) -> tuple[Node, list[Problem]]:
    """Read a recipe's file with everything it extends.

    Args:
        path: The file.
        seen: The files that are being read already, for finding circles.

    Returns:
        The merged tree, and the faults found on the way; the tree is empty where the file cannot be read.
    """
    name = display_name(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Node({}, name), [Problem(name, f"cannot be read: {error}")]
    node, problems = parse(text, name=name)
    if node is None:
        return Node({}, name), problems or [Problem(name, "the file is empty")]
    if not isinstance(node.value, dict):
        return Node({}, name), [*problems, Problem(node.where, f"expected keys and values, got {show(node.plain())}")]
    extends = node.value.pop(EXTENDS, None)
    if extends is None:
        return node, problems
    merged = Node({}, node.where)
    for piece, faults in _extended(extends, path, (*seen, path.resolve())):
        problems += faults
        merged = merge(merged, piece)
    return merge(merged, node), problems


def display_name(path: Path) -> str:
    """Return a path as people know it: relative to the current directory where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _extended(extends: Node, path: Path, seen: tuple[Path, ...]) -> list[tuple[Node, list[Problem]]]:
    entries = extends.value if isinstance(extends.value, list) else [extends]
    return [_piece(entry, path, seen) for entry in entries]


def _piece(entry: Node, path: Path, seen: tuple[Path, ...]) -> tuple[Node, list[Problem]]:
    empty = Node({}, entry.where)
    if not isinstance(entry.value, str):
        message = f"extends: expected a file or a list of files, got {show(entry.plain())}"
        return empty, [Problem(entry.where, message)]
    found = find_piece(entry.value, base=path.parent)
    if found is None:
        close = nearest(entry.value, list_pieces())
        return empty, [Problem(entry.where, f"extends: no such file: {entry.value}", f"did you mean {close}?" if close else None)]
    if found.resolve() in seen:
        return empty, [Problem(entry.where, f"extends: {entry.value} extends itself")]
    return read_tree(found, seen=seen)


def _override(text: str) -> tuple[Node | None, list[Problem]]:
    key, equals, value = text.partition("=")
    key = key.strip()
    where = f"override {key or text}"
    if not equals or not key or not all(key.split(".")):
        return None, [Problem(where, "expected key=value with a dotted key", "for example train.lr=2e-4")]
    if key.split(".")[0] == EXTENDS:
        return None, [Problem(where, "extends cannot be overridden", "write a recipe that extends both")]
    node, problems = parse(value, name=where, fixed_where=where)
    if problems:
        return None, problems
    return nested(key.split("."), node if node is not None else Node(None, where)), []


def _validate(tree: Node) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate(tree.plain()), []
    except ValidationError as error:
        problems, unknown = problems_of(error, tree=tree), unknown_keys(error)
    for path in unknown:
        parent, _ = locate(tree, path[:-1])
        if isinstance(parent.value, dict):
            parent.value.pop(str(path[-1]), None)
    # Pydantic looks for impossible combinations only in sections without other faults: look again without the unknown keys.
    return None, problems + (_validate(tree)[1] if unknown else [])
