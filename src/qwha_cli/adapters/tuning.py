"""What both tuners do to a whole model: hand computed starts to its layers, leave frozen tensors out of DDP, end quantization.

A tuner is what peft calls when an adapter is added, saved or merged; there is one for each kind of adapter (spectral/model.py,
low_rank/model.py), each derived from a class of peft and from `MergingTuner`, which says what both do when merging.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from qwha_cli.adapters.adapted_linear import AdaptedLinear, adapted_layers
from qwha_cli.adapters.base_layer import dense_linear
from qwha_cli.errors import ModelError
from qwha_cli.quant.embedding import TiedHead, dequantize_vocabulary
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.module import PackedModule

_ADAPTER_PREFIXES = (".qwha_", ".lora_")


class MergingTuner(BaseTuner):
    """What peft calls on a tuner whose layers may be quantized; stands before peft's own class among the bases."""

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Tensors that DistributedDataParallel must leave alone."""
        return _frozen_buffers(self)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft. A quantized layer makes way for a dense one in the model's dtype until `unmerge_adapter`."""
        _hand_on_dtype(self.model)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # noqa: ANN401 - peft declares None but returns the model
        ours = bool(adapted_layers(self.model))
        _hand_on_dtype(self.model)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge and ours:
            _dequantize(self.model)
        return self.model


def check_names(model: nn.Module, adapter_name: str, names: Iterable[str]) -> None:
    """Refuse a name that is no layer of an adapter.

    Raises:
        ModelError: It is not, and the message names it.
    """
    layers = adapted_layers(model)
    for name in names:
        if name not in layers or not layers[name].holds(adapter_name):
            raise ModelError(
                f"adapter {adapter_name} has no such layer",
                where=f"layer {name}",
                remedy="use full module names of the base model, such as model.layers.0.self_attn.q_proj",
            )


def _frozen_buffers(tuner: nn.Module) -> list[str]:
    """Tensors that DistributedDataParallel must leave alone, by every name that it may see them under.

    Places and codes never change, so broadcasting them is waste, and neither gloo nor NCCL can broadcast all: they know no int16.
    """
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in tuner.named_modules()
        if isinstance(module, AdaptedLinear | PackedModule)
        for name, _ in module.named_buffers()
        if not name.startswith("base_layer.")
    ]
    # DDP wraps the PeftModel around the tuner, or the tuner itself
    return names + [f"base_model.{name}" for name in names]


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter outside of adapters; float32 if it has none."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(prefix in name for prefix in _ADAPTER_PREFIXES):
            return parameter.dtype
    return torch.float32


def _hand_on_dtype(model: nn.Module) -> None:
    """Tell every adapted layer the model's dtype: that of the dense weight that a quantized layer is merged into."""
    dtype = model_dtype(model)
    for layer in adapted_layers(model).values():
        layer.merge_dtype = dtype


def _dequantize(model: nn.Module) -> None:
    """Replace what is still quantized after a merge: layers without an adapter, and the vocabulary.

    Removes every sign of a quantized model.
    """
    dtype = model_dtype(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # a head without codes of its own needs its embedding
            if isinstance(child, QuantizedLinear) and not isinstance(child, TiedHead):
                setattr(parent, name, dense_linear(child.weight_in_weight_basis(dtype).detach(), child.bias))
    dequantize_vocabulary(model, dtype)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    # what transformers sets on a model that it loaded quantized; left alone, save_pretrained would consult them
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
