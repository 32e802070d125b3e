"""A text file of the user's own, read whole."""

from __future__ import annotations

from qwha_cli.data import files
from qwha_cli.errors import DataError


def read(path: str | None, *, split: str) -> str:
    """The text of a file.

    Args:
        path: A text file, or a folder with `<split>.txt`.
        split: Which file of a folder.

    Raises:
        DataError: No path, no such file, not UTF-8, or nothing in it.
    """
    if path is None:
        raise DataError("a text needs a path", where="text", remedy="set path to a .txt file beside the data")
    file = files.find_file(path, split=split, suffixes=(".txt",))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start})", where=str(file), remedy="save the file as UTF-8") from error
    if not text.strip():
        raise DataError("this file is empty", where=str(file), remedy="check that the download was complete")
    return text
