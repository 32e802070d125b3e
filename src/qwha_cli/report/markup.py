"""HTML that escapes by construction: text is escaped wherever it enters an element; only what an element returned passes as is.

Nothing in a report is trusted: a model's answer, a note, a file name or a recipe may hold `<script>`.
"""

from __future__ import annotations

import html

_VOID = frozenset({"img", "source", "meta", "br"})


class Safe(str):
    """Markup made here. Any other string is text and gets escaped."""


def element(tag: str, /, *children: str, **attributes: str) -> Safe:
    """Return one element.

    Args:
        tag: Its name.
        children: Text, which is escaped, or markup from here, which is not.
        attributes: Values are escaped; `class_` means `class`, and `data_x` means `data-x`.
    """
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    if tag in _VOID:
        return Safe(f"<{tag}{written}>")
    inside = "".join(child if isinstance(child, Safe) else html.escape(child) for child in children)
    return Safe(f"<{tag}{written}>{inside}</{tag}>")


def join(*parts: str, between: str = "\n") -> Safe:
    """Return several pieces as one; text among them is escaped."""
    return Safe(between.join(part if isinstance(part, Safe) else html.escape(part) for part in parts if part))
