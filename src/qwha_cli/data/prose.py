"""The text that comes with the package: encyclopedic prose for calibration and perplexity where there is no network.

Two parts that share no passage, `texts/prose-train.txt` and `texts/prose-test.txt`.
"""

from __future__ import annotations

from importlib import resources

from qwha_cli.errors import DataError


def read(path: str | None, *, split: str) -> str:
    """The text of a part.

    Args:
        path: Must be None; the text is part of the package.
        split: "train" or "test".

    Raises:
        DataError: A path was given, or there is no such part.
    """
    if path is not None:
        raise DataError("the built-in prose takes no path", where=path, remedy="use data: text for a text file of your own")
    if split not in ("train", "test"):
        raise DataError(f"the built-in prose has train and test, not {split!r}", where="prose", remedy="set split: train")
    file = resources.files("qwha_cli.data") / "texts" / f"prose-{split}.txt"
    if not file.is_file():
        raise DataError("this text is missing from the installed package", where=str(file), remedy="install qwha again")
    return file.read_text(encoding="utf-8")
