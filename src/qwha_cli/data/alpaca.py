"""Alpaca: instructions with an optional input and an output, in Stanford's prompt.

Source: the hub's `yahma/alpaca-cleaned` (51,760 examples, one split), or a local `.json` list or `.jsonl` with
`{"instruction", "input", "output"}`. Whether the prompt carries loss is the recipe's choice (`train.data.mask_prompt`); the paper
trains on both.
"""

from __future__ import annotations

from qwha_cli.data import files, hub
from qwha_cli.data.example import Example, prompt_and_response
from qwha_cli.errors import DataError

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def read(path: str | None, *, split: str, seed: int = 0, limit: int | None = None, tokenizer: object = None) -> list[Example]:
    """Alpaca examples in the order of the file.

    Args:
        path: A local file, or a folder with `<split>.json` or `.jsonl`; None for the hub.
        split: "train"; others only from a local folder or file.
        seed: Unused; nothing here is random.
        limit: Only the first so many.
        tokenizer: Unused.

    Raises:
        DataError: No such file or split, hub out of reach, or a malformed record (named).
    """
    if path is not None:
        file = files.find_file(path, split=split)
    elif split == "train":
        file = hub.fetch("yahma/alpaca-cleaned", "alpaca_data_cleaned.json")
    else:
        raise DataError(f"Alpaca has only a train split, not {split!r}", where="alpaca", remedy="name a local file as path")
    return files.read_examples(files.read_records(file), _example, limit=limit)


def _example(record: files.Record, where: str) -> Example:
    instruction = files.text_field(record, "instruction", where=where).strip()
    context = files.text_field(record, "input", where=where, optional=True).strip()
    # str.replace and not str.format: instructions are full of braces
    template = WITH_INPUT.replace("{input}", context) if context else WITHOUT_INPUT
    prompt = template.replace("{instruction}", instruction)
    return prompt_and_response(prompt, files.text_field(record, "output", where=where))
