"""Every key that a recipe can have, with type, default and meaning, read off the schema.

`qwha recipes keys` prints it, docs/recipes.md lists it (a test compares them), and errors find the nearest valid key in it.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qwha_cli.catalog import nearest
from qwha_cli.recipe.schema import Recipe
from qwha_cli.recipe.section import Section

Path = tuple[str | int, ...]
# How alike two words must be for one to be the other, mistyped.
TYPO = 0.75

_WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", types.NoneType: "null"}


@dataclass(frozen=True)
class Key:
    """One key of a recipe: dotted name, type and default as text (`required` where there is none), meaning."""

    name: str
    type: str
    default: str
    meaning: str


def list_keys(section: type[Section] = Recipe, *, prefix: str = "") -> Iterator[Key]:
    """Yield every key below a section, depth first, the section's own line before its keys; a list's items as `tasks[].name`."""
    for name, info in section.model_fields.items():
        dotted = f"{prefix}{name}"
        yield Key(dotted, _type_text(info.annotation), _default_text(info), info.description or "")
        inner, many = _inner_section(info.annotation)
        if inner is not None:
            yield from list_keys(inner, prefix=f"{dotted}[]." if many else f"{dotted}.")


def keys_at(path: Path) -> list[str]:
    """Return the keys that the section at `path` has; empty where there is no section."""
    section: type[Section] = Recipe
    for step in path:
        if isinstance(step, int):
            continue
        info = section.model_fields.get(step)
        inner = _inner_section(info.annotation)[0] if info else None
        if inner is None:
            return []
        section = inner
    return list(section.model_fields)


def suggest(path: Path) -> str | None:
    """Return the dotted valid key that an unknown key at `path` most likely means, or None.

    A typo at the same level comes first, then the same word in another section, then whatever is near: here, else elsewhere.
    """
    *parents, last = path
    word, here = str(last), tuple(parents)
    siblings = keys_at(here)
    elsewhere = {key.name: key.name.rpartition(".")[2] for key in list_keys() if "[]" not in key.name}
    if typo := difflib.get_close_matches(word, siblings, n=1, cutoff=TYPO):
        return dotted_name((*here, typo[0]))
    for meant in (word, *difflib.get_close_matches(word, set(elsewhere.values()), n=1, cutoff=TYPO)):
        same = [name for name, leaf in elsewhere.items() if leaf == meant]
        if same:
            # of several, one below the section that the key was put into; else the least deep
            prefix = f"{dotted_name(here)}."
            return min(same, key=lambda name: (not name.startswith(prefix), name.count("."), name))
    near = nearest(word, siblings)
    return dotted_name((*here, near)) if near else None


def dotted_name(path: Path) -> str:
    """Return a path as it is written in overrides: `eval.tasks[0].name`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _inner_section(annotation: object) -> tuple[type[Section] | None, bool]:
    """Return the section that an annotation holds, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation, False) if issubclass(annotation, Section) else (None, False)
    many = get_origin(annotation) is tuple
    for part in get_args(annotation):
        inner, deeper = _inner_section(part)
        if inner is not None:
            return inner, many or deeper
    return None, False


def _type_text(annotation: object) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(parts[0])
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(part) for part in parts)
    if origin is tuple:
        return f"list of {_plural(_type_text(parts[0]))}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type):
        return "section" if issubclass(annotation, BaseModel) else _WORDS.get(annotation, annotation.__name__)
    return str(annotation)


def _plural(text: str) -> str:
    return {"text": "texts", "section": "sections"}.get(text, text)


def _default_text(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "-"
    if isinstance(value, bool) or value is None:
        return f"`{ {True: 'true', False: 'false', None: 'null'}[value] }`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(item) for item in value)}]`"
    return f"`{value}`"
