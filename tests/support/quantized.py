"""Tiny models with packed layers, by any quantizer and in either basis."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwha_cli import catalog
from qwha_cli.kernels.wht import wht
from qwha_cli.quant.embedding import put_vocabulary, vocabulary_of
from qwha_cli.quant.gram import Gram
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import PackedWeight, QuantizerOptions
from qwha_cli.quant.swap import replace
from qwha_cli.quantizers.vocabulary import quantize_words, vocabulary_options

TOKENS = torch.arange(24).view(2, 12)


def options(method: str = "rtn", bits: int = 4, group_size: int = 16, basis: str = "weight", **more: object) -> QuantizerOptions:
    return QuantizerOptions(method, bits, group_size, basis=basis, **more)


def run_quantizer(weight: Tensor, gram: Tensor | None, wanted: QuantizerOptions, name: str = "test") -> PackedWeight:
    """The catalogue's quantizer of that name."""
    curvature = None if gram is None else Gram(gram)
    return catalog.load(catalog.QUANTIZERS[wanted.method])(weight, curvature, options=wanted, name=name)


def quantize_blocks(model: PreTrainedModel, wanted: QuantizerOptions) -> PreTrainedModel:
    """Pack every linear of the decoder blocks, in place, without calibration."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            weight = module.weight.detach()
            packed = run_quantizer(wht(weight) if wanted.basis == "hadamard" else weight, None, wanted, name)
            replace(model, name, QuantizedLinear.from_packed(packed, module.bias))
    return model


def quantize_words_of(model: PreTrainedModel, group_size: int = 16) -> PreTrainedModel:
    """Put embedding and head into 8 bits, in place."""
    vocabulary = vocabulary_of(model, format=vocabulary_options(group_size).format)
    weights = {name: model.get_submodule(name).weight.detach() for name in vocabulary.owners}
    cpu = torch.device("cpu")
    packed = {name: quantize_words(weight, group_size=group_size, name=name, device=cpu) for name, weight in weights.items()}
    put_vocabulary(model, vocabulary, packed)
    return model


def correlated_inputs(count: int, features: int, *, seed: int = 0) -> Tensor:
    """Inputs with a spectrum over two decades and two outlier channels: float32 (count, features)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    inputs = torch.randn(count, features, generator=generator) * torch.logspace(-1, 1, features) @ mixing
    inputs[:, [1, features // 2]] *= 8
    return inputs


def gaussian(rows: int, cols: int, *, seed: int = 0, std: float = 0.05) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * std
