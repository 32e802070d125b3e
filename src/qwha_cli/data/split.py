"""Taking a validation part from the training examples; the test part is never touched."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qwha_cli.data.example import Example
from qwha_cli.errors import DataError


def train_validation(examples: Sequence[Example], *, size: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Set aside `size` examples for validation, the same ones for the same seed.

    Examples whose text occurs twice are kept on one side: a validation example is removed from training in all its copies.

    Args:
        examples: The training split.
        size: How many to set aside; 0 leaves validation empty.
        seed: Which ones.

    Returns:
        Training and validation examples, both in their original order.

    Raises:
        DataError: Nothing would be left to train on.
    """
    unique = sorted({example: index for index, example in reversed(list(enumerate(examples)))}.values())
    if not 0 <= size < len(unique):
        raise DataError(
            f"cannot set aside {size} of {len(unique)} different examples for validation",
            remedy="lower train.validation.examples or raise train.data.limit",
        )
    chosen = {examples[index] for index in random.Random(seed).sample(unique, size)}
    validation = [examples[index] for index in unique if examples[index] in chosen]
    return [example for example in examples if example not in chosen], validation
