"""Our own school word problems: one to three steps of small integers with worked solutions, in exactly GSM8K's form.

For a demonstration and for tests: no download, no licence question, any amount, short enough to train on a laptop. A problem
belongs to the train, validation or test split by a hash of its question, so none can be in two splits whatever seeds and sizes.
The kinds of problem live in `word_problems.py`.
"""

from __future__ import annotations

import hashlib
import random

from qwha_cli.data.example import Example
from qwha_cli.data.gsm8k import word_problem
from qwha_cli.data.word_problems import KINDS
from qwha_cli.errors import DataError

VERSION = 2
"""Raise when generated problems change, so that what was trained on the old ones becomes stale."""

DEFAULT_COUNT = {"train": 2000, "validation": 200, "test": 200}

# of 20 hash values: two for test, two for validation, the others for train
_TEST, _VALIDATION, _BUCKETS = 2, 4, 20
_PATIENCE = 20_000


def split_of(question: str) -> str:
    """The one split that a question belongs to."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) % _BUCKETS
    return "test" if bucket < _TEST else "validation" if bucket < _VALIDATION else "train"


def read(path: str | None, *, split: str, seed: int = 0, limit: int | None = None, tokenizer: object = None) -> list[Example]:
    """Generate problems; the same seed, split and limit give the same problems, and a larger limit only adds to them.

    Args:
        path: Must be None; there is nothing to read.
        split: "train", "validation" or "test".
        seed: Which problems. Splits stay disjoint across seeds.
        limit: How many; None for 2000 (train) or 200 (validation, test).
        tokenizer: Unused.

    Returns:
        Different problems, kinds in random order.

    Raises:
        DataError: A path was given, no such split, or more problems than the generator knows.
    """
    if path is not None:
        raise DataError("synthetic problems are generated and take no path", where=path, remedy="use format: jsonl for a file")
    if split not in DEFAULT_COUNT:
        raise DataError(f"splits: train, validation and test, not {split!r}", where="synthetic", remedy="correct the split")
    wanted = DEFAULT_COUNT[split] if limit is None else limit
    rng = random.Random(f"synthetic/{VERSION}/{seed}/{split}")
    found: dict[str, Example] = {}
    misses = 0
    while len(found) < wanted:
        question, steps, answer = rng.choice(KINDS)(rng)
        if question in found or split_of(question) != split:
            misses += 1
            if misses > _PATIENCE:
                message = f"only {len(found)} different problems found of {wanted} for {split}"
                raise DataError(message, where="synthetic", remedy="lower the limit")
            continue
        misses = 0
        found[question] = word_problem(question, "\n".join(steps), answer=str(answer))
    return list(found.values())
