"""Where recipes come from: a path, or the name of one that is shipped with the package.

In a wheel the recipes and the pieces they extend lie in `qwha_cli/shipped/`; in a checkout they are the `recipes/` and `configs/`
folders at its root; `configs/accelerate/` is for `accelerate launch` and no piece of a recipe. A reference with the suffix .yaml
or a slash is a path first and a name second.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwha_cli.catalog import nearest
from qwha_cli.errors import Problem, RecipeError

SUFFIX = ".yaml"
CONFIG_PREFIX = "configs:"
# beside the pieces lie configurations of accelerate, which no recipe can extend
_NO_PIECES = "accelerate"


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe of the package: its name, its file, and the first line of its header."""

    name: str
    path: Path
    summary: str


def shipped_folder(kind: Literal["recipes", "configs"]) -> Path:
    """Return the folder of the shipped recipes, or of the pieces they extend."""
    installed = Path(str(importlib.resources.files("qwha_cli"))) / "shipped" / kind
    if installed.is_dir():
        return installed
    return Path(__file__).resolve().parents[3] / kind  # an editable install: the checkout's own folder


def list_shipped() -> list[ShippedRecipe]:
    """Return every shipped recipe, by name."""
    return [ShippedRecipe(path.stem, path, summary(path)) for path in sorted(shipped_folder("recipes").glob(f"*{SUFFIX}"))]


def summary(path: Path) -> str:
    """Return what the first header line (`# What it does: ...`) of a recipe says; empty if there is none."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().removeprefix("What it does:").strip() if first.startswith("#") else ""


def find(reference: str | Path) -> Path:
    """Return the file that a reference names.

    Args:
        reference: A path, or a shipped recipe's name with or without `.yaml`.

    Raises:
        RecipeError: Neither a file nor a shipped name.
    """
    text = str(reference)
    path = Path(text).expanduser()
    if path.is_file():
        return path
    names = {recipe.name: recipe.path for recipe in list_shipped()}
    stem = text.removesuffix(SUFFIX)
    if stem in names:
        return names[stem]
    close = nearest(path.name.removesuffix(SUFFIX), names)
    problem = Problem(text, "no such file, and no shipped recipe of that name", f"did you mean {close}?" if close else None)
    raise RecipeError([problem], remedy="`qwha recipes ls` lists the shipped recipes")


def find_piece(reference: str, *, base: Path) -> Path | None:
    """Return the file that an `extends:` entry names, or None where there is none.

    Args:
        reference: `configs:train/gsm8k` for a shipped piece, else a path relative to `base` (suffix .yaml optional).
        base: Folder of the recipe that extends.
    """
    if reference.startswith(CONFIG_PREFIX):
        path = shipped_folder("configs") / reference.removeprefix(CONFIG_PREFIX)
    else:
        path = base / Path(reference).expanduser()
    candidates = (path, path.with_name(path.name + SUFFIX))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def list_pieces() -> list[str]:
    """Return every shipped piece as an `extends:` entry."""
    root = shipped_folder("configs")
    paths = [path.relative_to(root) for path in root.rglob(f"*{SUFFIX}")]
    return sorted(CONFIG_PREFIX + path.with_suffix("").as_posix() for path in paths if path.parts[0] != _NO_PIECES)
