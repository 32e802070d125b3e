"""Calibration tokens: random windows of running text that show a quantizer what the layers' inputs look like.

Windows are contiguous, all of one length, no padding and no mask. As long as the text has enough of them they do not overlap.
A test set is refused: calibrating on what is scored later makes the score worthless (the paper's own code does it).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from qwha_cli import catalog
from qwha_cli.data import files, jsonl, text
from qwha_cli.data.example import Example
from qwha_cli.data.tokenize import begin_ids, encode, text_ids
from qwha_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextReader(Protocol):
    """How an entry of catalog.TEXTS is called."""

    def __call__(self, path: str | None, *, split: str) -> str:
        """The text of a split."""
        ...


class ExampleReader(Protocol):
    """How an entry of catalog.DATASETS is called."""

    def __call__(
        self, path: str | None, *, split: str, seed: int, limit: int | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> list[Example]:
        """The examples of a split."""
        ...


def read_examples(
    name: str,
    path: str | None,
    *,
    split: str,
    seed: int = 0,
    limit: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Example]:
    """Examples of a data set by its name in the catalogue.

    Raises:
        DataError: No such name (the nearest is named), or whatever the reader of the data set finds wrong.
    """
    if name not in catalog.DATASETS:
        raise _unknown(name, [*catalog.DATASETS])
    reader = cast("ExampleReader", catalog.load(catalog.DATASETS[name]))
    return reader(path, split=split, seed=seed, limit=limit, tokenizer=tokenizer)


def read_text(name: str, path: str | None, *, split: str) -> str:
    """A running text by its name in the catalogue, or a `.txt` file.

    Raises:
        DataError: No such name (the nearest is named), or whatever the reader of the text finds wrong.
    """
    if name.endswith(".txt"):
        return text.read(name, split=split)
    if name not in catalog.TEXTS:
        raise _unknown(name, [*catalog.TEXTS])
    return cast("TextReader", catalog.load(catalog.TEXTS[name]))(path, split=split)


def calibration_tokens(
    *, data: str, path: str | None, split: str, samples: int, length: int, seed: int, tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """Draw calibration windows.

    Args:
        data: A name of catalog.TEXTS or catalog.DATASETS, or a `.txt` or `.jsonl` file. Examples of a data set are
            joined, each as prompt and response with the end token behind it.
        path: Local copy of a named text or data set; None for the hub or the package.
        split: Which split; "test" is refused.
        samples: How many windows.
        length: Tokens a window.
        seed: Which windows.
        tokenizer: The model's.

    Returns:
        int64 (samples, length) on the CPU.

    Raises:
        DataError: A test set, an unknown name, data that cannot be read, or too little text (with the counts).
    """
    for name in (split, Path(path).name if path is not None else "", Path(data).name):
        if files.names_test(name):
            raise DataError(
                f"{name!r} says that this is a test set, and calibrating on it would leak it into every later score",
                where="quantize.calibration",
                remedy="use split: train, or rename the file if it is no test set",
            )
    rng = random.Random(seed)
    if data in catalog.TEXTS or data.endswith(".txt"):
        source = read_text(data, path, split=split)
        ids = begin_ids(tokenizer, source) + text_ids(tokenizer, source)
    else:
        ids = _example_ids(data, path, split=split, wanted=samples * length, rng=rng, tokenizer=tokenizer)
    starts = _starts(len(ids), samples=samples, length=length, rng=rng, where=path or data)
    return torch.tensor([ids[start : start + length] for start in starts], dtype=torch.int64)


def _example_ids(
    data: str, path: str | None, *, split: str, wanted: int, rng: random.Random, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    if data.endswith((".jsonl", ".json")):
        examples = jsonl.read(data, split=split)
    elif data in catalog.DATASETS:
        examples = read_examples(data, path, split=split, tokenizer=tokenizer)
    else:
        raise _unknown(data, [*catalog.TEXTS, *catalog.DATASETS])
    rng.shuffle(examples)
    ids: list[int] = []
    for example in examples:
        if len(ids) > 2 * wanted:
            break  # windows are drawn from twice what is needed; tokenizing a whole large set would take minutes
        ids += encode(example, tokenizer).input_ids
    return ids


def _starts(count: int, *, samples: int, length: int, rng: random.Random, where: str) -> list[int]:
    if count < length + samples - 1:
        raise DataError(
            f"{count} tokens are too few for {samples} different windows of {length}",
            where=where,
            remedy="lower quantize.calibration.samples or length, or use a longer text",
        )
    whole = count // length
    if whole >= samples:
        offset = rng.randint(0, count % length)
        return [offset + length * window for window in rng.sample(range(whole), samples)]
    return rng.sample(range(count - length + 1), samples)


def _unknown(name: str, names: list[str]) -> DataError:
    near = catalog.nearest(name, names)
    hint = f"did you mean {near!r}? " if near else ""
    known = ", ".join(sorted(names))
    return DataError(f"no data of this name; {hint}known: {known}", where=name, remedy="correct the name in the recipe")
