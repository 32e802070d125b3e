"""One number for a quantized base: which codes, scales and zeros its modules hold, whatever is wrapped around them.

An adapter is right only on the base that it was computed for; its config carries this fingerprint. What can change without
changing the base is left out: the dtype of everything that is not packed (biases too), the device, and the names that peft adds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qwha_cli.errors import ModelError
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.module import PackedModule

# inserted into module paths by peft's tuner layers and by torch.compile
_WRAPPERS = frozenset({"base_layer", "_orig_mod"})
_PEFT_PREFIX = "base_model.model."


def fingerprint(model: nn.Module) -> str:
    """SHA-256, as 64 hexadecimal digits, over format and tensors of everything in codes in the order of its names.

    Args:
        model: A transformers model, or a PeftModel around one; adapters and wrappers do not count. No tensor on the meta device.

    Raises:
        ModelError: There is no quantized layer.
    """
    return combined({base_name(name): module.packed().digest() for name, module in packed_modules(model).items()})


@dataclass(frozen=True)
class PackedLayer:
    """What a folder's config says of a quantized layer that need not be in memory: its inputs and the digest of its codes."""

    in_features: int
    digest: str


def combined(digests: Mapping[str, str]) -> str:
    """The fingerprint of a model whose quantized layers have these digests, by their names in the bare model.

    Raises:
        ModelError: There is no quantized layer.
    """
    if not digests:
        raise ModelError("the model has no quantized layer", where="fingerprint", remedy="quantize it with `qwha quantize`")
    found = hashlib.sha256()
    for name in sorted(digests):
        found.update(f"{name} {digests[name]}\n".encode())
    return found.hexdigest()


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Every QuantizedLinear of a model by its full name, wrappers included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """Every module of a model that has codes of its own, linear layers and embeddings, by its full name, wrappers included."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    return {name: module for name, module in packed.items() if module.source is module}


def base_name(name: str) -> str:
    """A module's name as it is in the bare model: without what peft and torch.compile insert."""
    kept = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return kept.removeprefix(_PEFT_PREFIX)
