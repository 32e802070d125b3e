"""Output that is a command's result: stdout, one JSON object or text that a program may read."""

from __future__ import annotations

import json
import sys


def print_json(value: object) -> None:
    """Print one JSON object to stdout; numbers that are not finite become null, since JSON has none."""
    sys.stdout.write(json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def print_text(text: str) -> None:
    """Print text to stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def finite(value: object) -> object:
    """Return a JSON-able copy of a value: inf and nan as None, paths and other objects as text."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
