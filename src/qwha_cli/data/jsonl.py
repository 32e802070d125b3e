"""Plain jsonl: `{"prompt", "response"}` with an optional "answer" for exact match, or `{"text"}` that is trained whole."""

from __future__ import annotations

from qwha_cli.data import files
from qwha_cli.data.example import Example, Segment, prompt_and_response
from qwha_cli.errors import DataError


def read(path: str | None, *, split: str, seed: int = 0, limit: int | None = None, tokenizer: object = None) -> list[Example]:
    """Examples of a local file, in its order and with its text unchanged.

    Args:
        path: A `.jsonl` (or `.json` list), or a folder with `<split>.jsonl`.
        split: Which file of a folder.
        seed: Unused; nothing here is random.
        limit: Only the first so many.
        tokenizer: Unused.

    Raises:
        DataError: No path, no such file, or a malformed line (named).
    """
    if path is None:
        raise DataError("format jsonl needs a path", where="jsonl", remedy="set path to a .jsonl file beside the format")
    return files.read_examples(files.read_records(files.find_file(path, split=split)), _example, limit=limit)


def _example(record: files.Record, where: str) -> Example:
    if "text" in record and "prompt" not in record:
        return Example((Segment(files.text_field(record, "text", where=where), True),))
    prompt = files.text_field(record, "prompt", where=where)
    answer = record.get("answer")
    response = files.text_field(record, "response", where=where)
    return prompt_and_response(prompt, response, answer=None if answer is None else str(answer))
