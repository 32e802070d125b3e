r"""GSM8K: school word problems with worked solutions, in the prompt of the QWHA paper (docs/method.md, "Prompts").

    prompt    question + "\nAnswer the above question. First think step by step and then answer the final number.\n"
    response  the solution, its last line "#### 18" written as "The final answer is: 18"

Calculator annotations (`48/2 = <<48/2=24>>24`) are removed: they cost a third of the tokens, no evaluation reads them and a model
without a calculator gains nothing from writing them. Thousands separators are removed from the final number.
Source: the hub's `openai/gsm8k`, or a local file or folder of `{"question", "answer"}` lines.
"""

from __future__ import annotations

import re

from qwha_cli.data import files, hub
from qwha_cli.data.example import Example, prompt_and_response
from qwha_cli.errors import DataError

INSTRUCTION = "\nAnswer the above question. First think step by step and then answer the final number.\n"
ANSWER_PREFIX = "The final answer is: "

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"\n?#### *(?P<number>[^\n]*?)\s*\Z")


def word_problem(question: str, rationale: str, *, answer: str) -> Example:
    """An example in the paper's form: the question with its instruction, the rationale and the final-answer line."""
    return prompt_and_response(question + INSTRUCTION, f"{rationale}\n{ANSWER_PREFIX}{answer}", answer=answer)


def read(path: str | None, *, split: str, seed: int = 0, limit: int | None = None, tokenizer: object = None) -> list[Example]:
    """GSM8K examples in the order of the file.

    Args:
        path: A local `.jsonl`, or a folder with `train.jsonl` and `test.jsonl`; None for the hub.
        split: "train" or "test".
        seed: Unused; nothing here is random.
        limit: Only the first so many.
        tokenizer: Unused.

    Raises:
        DataError: No such file or split, hub out of reach, or a malformed line (named).
    """
    if path is not None:
        return files.read_examples(files.read_records(files.find_file(path, split=split)), _example, limit=limit)
    if split not in ("train", "test"):
        message = f"GSM8K has the splits train and test, not {split!r}"
        raise DataError(message, where="gsm8k", remedy="use train.validation for a part of train")
    records = hub.read_parquet(hub.fetch("openai/gsm8k", f"main/{split}-00000-of-00001.parquet"))
    return files.read_examples(records, _example, limit=limit)


def _example(record: files.Record, where: str) -> Example:
    question = files.text_field(record, "question", where=where).strip()
    solution = _ANNOTATION.sub("", files.text_field(record, "answer", where=where))
    final = _FINAL.search(solution)
    if final is None or not final["number"]:
        raise DataError("the answer does not end in a line '#### NUMBER'", where=where, remedy="correct it, or use format: jsonl")
    return word_problem(question, solution[: final.start()].strip(), answer=final["number"].replace(",", ""))
