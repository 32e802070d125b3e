"""WikiText-2 raw, joined with blank lines between its paragraphs as in the GPTQ and QWHA papers.

Source: the hub's `Salesforce/wikitext`, or a local text file.
"""

from __future__ import annotations

from qwha_cli.data import files, hub, text
from qwha_cli.errors import DataError

SPLITS = ("train", "validation", "test")


def read(path: str | None, *, split: str) -> str:
    """The text of a split.

    Args:
        path: A local text file (read as it is), or a folder with `<split>.txt`; None for the hub.
        split: "train", "validation" or "test".

    Raises:
        DataError: No such split or file, or the hub is out of reach.
    """
    if path is not None:
        return text.read(path, split=split)
    if split not in SPLITS:
        raise DataError(f"WikiText-2 has {', '.join(SPLITS)}, not {split!r}", where="wikitext2", remedy="set split: train")
    records = hub.read_parquet(hub.fetch("Salesforce/wikitext", f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"))
    return "\n\n".join(files.text_field(record, "text", where=where) for where, record in records)
