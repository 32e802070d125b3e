"""Local data files: finding the one a split lives in, parsing it with errors that name file and line, and fingerprints.

A path is a file (one split, `.json` with a list or `.jsonl` with an object a line) or a folder that holds `train.jsonl`,
`test.jsonl` and so on. What a record means is the data set's business (`gsm8k.py`, `alpaca.py`, ...).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwha_cli.data.example import Example
from qwha_cli.errors import DataError

SUFFIXES = (".jsonl", ".json")
Record = dict[str, object]


def names_test(name: str) -> bool:
    """Whether the name of a split or of a file says that it is a test set."""
    return "test" in name.lower()


def find_file(path: str, *, split: str, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The file that holds a split.

    Args:
        path: A file, or a folder with `<split><suffix>` in it.
        split: "train", "validation" or "test".
        suffixes: What the folder is searched for, in order.

    Raises:
        DataError: Nothing there, or the file's name says that it is another split.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = [place / f"{split}{suffix}" for suffix in suffixes if (place / f"{split}{suffix}").is_file()]
        if not found:
            present = ", ".join(sorted(entry.name for entry in place.iterdir())[:8]) or "nothing"
            wanted = " or ".join(f"{split}{suffix}" for suffix in suffixes)
            raise DataError(f"no {wanted} in this folder (it holds {present})", where=path, remedy="name the file itself as path")
        return found[0]
    if not place.is_file():
        raise DataError("no such file or folder", where=path, remedy="correct the path (relative to where qwha is started)")
    words = set(re.split(r"[^a-z]+", place.name.lower()))
    if (split == "train" and "test" in words) or (split == "test" and "train" in words):
        raise DataError(
            f"split {split!r} asked for, but the file's name says otherwise", where=path, remedy="name the split's own file"
        )
    return place


def read_records(file: Path) -> Iterator[tuple[str, Record]]:
    """The objects of a `.json` list or of `.jsonl` lines, each with its place (`file:line`; for a list `file:[index]`).

    Raises:
        DataError: Not UTF-8, not JSON, a record that is no object, or no record at all.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start})", where=str(file), remedy="save the file as UTF-8") from error
    count = 0
    for where, value in _list_items(file, text) if file.suffix == ".json" and text.lstrip()[:1] == "[" else _lines(file, text):
        if not isinstance(value, dict):
            raise DataError(f"expected an object {{...}}, found {type(value).__name__}", where=where, remedy="correct it")
        count += 1
        yield where, value
    if not count:
        raise DataError("no records in this file", where=str(file), remedy="check that the download or export was complete")


def _list_items(file: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        values: list[object] = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg}", where=f"{file}:{error.lineno}", remedy="repair the file") from error
    for index, value in enumerate(values):
        yield f"{file}:[{index}]", value


def _lines(file: Path, text: str) -> Iterator[tuple[str, object]]:
    # split at newlines only: splitlines() also breaks at U+2028, which JSON strings may contain
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{file}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                remedy = "one JSON object a line; a file with one list of objects must be named .json"
                raise DataError(f"not JSON: {error.msg}", where=f"{file}:{number}", remedy=remedy) from error


def text_field(record: Record, key: str, *, where: str, optional: bool = False) -> str:
    """A field that must be a string; an optional one may be missing or null and is then empty.

    Raises:
        DataError: The key is missing (the keys that are there are listed) or its value is no string.
    """
    value = record.get(key)
    if value is None and optional:
        return ""
    if key not in record:
        keys = ", ".join(sorted(record)) or "none"
        raise DataError(f"key {key!r} is missing (keys here: {keys})", where=where, remedy="check the format in the recipe")
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be text, found {type(value).__name__}", where=where, remedy="correct this record")
    return value


def read_examples(
    records: Iterator[tuple[str, Record]], to_example: Callable[[Record, str], Example], *, limit: int | None
) -> list[Example]:
    """Convert the first `limit` records (all when None), in the order of the file."""
    examples: list[Example] = []
    for where, record in records:
        if limit is not None and len(examples) >= limit:
            break
        examples.append(to_example(record, where))
    return examples


def file_digest(path: str | Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files (not its sub-folders).

    Raises:
        DataError: Nothing at this path.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError("no such file or folder", where=str(path), remedy="correct the path (relative to where qwha is started)")
    digest = hashlib.sha256()
    for file in sorted(entry for entry in place.iterdir() if entry.is_file()) if place.is_dir() else [place]:
        if place.is_dir():
            digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
