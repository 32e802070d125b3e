"""Embedding and head in 8 bits, as a step of the quantize stage.

They are quantized before calibration text runs through the model, so that the blocks are fitted to the inputs they will see. It
takes seconds and gives the same each time, so a killed stage does it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwha_cli.kernels.dequantize import dequantize_span
from qwha_cli.models.stream import OpenModel
from qwha_cli.quant.embedding import Vocabulary, put_vocabulary, vocabulary_of
from qwha_cli.quant.packed import PackedWeight, check_group
from qwha_cli.quantizers.vocabulary import quantize_words, vocabulary_options
from qwha_cli.stages.context import StageContext

# words compared with their original at a time
_COMPARED = 1 << 13


@dataclass(frozen=True)
class Words:
    """A model's vocabulary in codes.

    Attributes:
        vocabulary: Which modules they are.
        packed: The codes, by the names of `vocabulary.owners`.
        sqnr_db: The worst signal-to-noise ratio among them.
    """

    vocabulary: Vocabulary
    packed: dict[str, PackedWeight]
    sqnr_db: float

    @property
    def weights(self) -> int:
        """How many numbers of the original the codes stand for."""
        return sum(packed.shape[0] * packed.shape[1] for packed in self.packed.values())

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by full name."""
        return {f"{name}.{key}": tensor for name, packed in self.packed.items() for key, tensor in packed.tensors.items()}

    def digests(self) -> dict[str, str]:
        """Of the codes, by module."""
        return {name: packed.digest() for name, packed in self.packed.items()}

    def results(self) -> dict[str, object]:
        """For the manifest."""
        stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
        return {
            "vocabulary_weights": self.weights,
            "vocabulary_bits_per_weight": stored / self.weights,
            "vocabulary_sqnr_db": self.sqnr_db,
        }


def quantize_vocabulary(context: StageContext, opened: OpenModel) -> Words | None:
    """Quantize embedding and head and put them into the opened model, if the recipe asks for it.

    Args:
        context: The stage's.
        opened: The 16-bit model; its embedding and head are exchanged.

    Raises:
        ModelError: They are of a kind that cannot be stored so, or a row is no whole number of groups.
        NumericsError: A number is not finite.
    """
    settings = context.recipe.quantize
    if settings.embedding_bits == 16:
        return None
    vocabulary = vocabulary_of(opened.model, format=vocabulary_options(settings.group_size).format)
    packed: dict[str, PackedWeight] = {}
    ratios: list[float] = []
    for name in vocabulary.owners:
        context.progress(0, 1, f"quantizing {name}")
        weight = opened.weight(name)
        check_group(name, weight.shape[1], settings.group_size)
        packed[name] = quantize_words(weight, group_size=settings.group_size, name=name, device=context.device)
        ratios.append(_sqnr_db(weight, packed[name]))
    put_vocabulary(opened.model, vocabulary, packed)
    return Words(vocabulary, packed, min(ratios))


def _sqnr_db(weight: Tensor, packed: PackedWeight) -> float:
    """`sqnr_db` of a matrix too large to be made dense at once."""
    codes = packed.as_codes()
    signal = noise = 0.0
    for start in range(0, weight.shape[0], _COMPARED):
        original = weight[start : start + _COMPARED].to(torch.float32)
        found = dequantize_span(codes, start, start + _COMPARED, torch.float32)
        signal += float(original.square().sum(dtype=torch.float64))
        noise += float((original - found).square().sum(dtype=torch.float64))
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf
