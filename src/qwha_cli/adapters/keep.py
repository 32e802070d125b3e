"""Dense weights from one optimizer step to the next: made for each pass, or kept, and which of them a device has room for.

In memory a kept weight is as large as an unquantized layer; in time it saves making it three times a step with recomputed
activations, and once more for every further forward under accumulation. The result is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from qwha_cli.adapters.adapted_linear import adapted_layers
from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.kernels.spectral_linear import Keep
from qwha_cli.quant.linear import QuantizedLinear

# the other three quarters are for activations, gradients and the optimizer
_KEPT_SHARE = 4


@dataclass(frozen=True)
class KeepChoice:
    """What was chosen, and why.

    Attributes:
        keep: Whether passes compute dense weights again, or keep them.
        reason: One sentence for the run's notes.
    """

    keep: Keep
    reason: str


def choose_keep(requested: Literal["auto"] | Keep, model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> KeepChoice:
    """Decide whether dense weights are kept from one optimizer step to the next.

    Args:
        requested: What the recipe says; `auto` keeps them on a CUDA device where they take a quarter of what is free at most, so
            that the rest is left for activations.
        model: With packed linear layers, already on the device.
        dtype: In which the layers will compute.
        device: Where.
    """
    if requested != "auto":
        return KeepChoice(requested, f"train.keep {requested}, as the recipe asks")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    dense = sum(layer.out_features * layer.in_features for layer in layers) * dtype.itemsize
    if device.type != "cuda":
        return KeepChoice("memory", f"dense weights are made for each pass: what is free on {device.type} is not known")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    sizes = f"{dense / 2**30:.1f} GiB of them, {free / 2**30:.1f} GiB free"
    if dense * _KEPT_SHARE <= free:
        return KeepChoice("speed", f"dense weights are kept until the next optimizer step: {sizes}")
    return KeepChoice("memory", f"dense weights are made for each pass: {sizes}")


def set_keep(model: nn.Module, keep: Keep) -> None:
    """Choose for all layers whether passes compute dense weights again ("memory") or keep them until values change ("speed").

    Beside a LoRA, and without an adapter, it is the base's own dense weight that is kept.
    """
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.keep = keep
        if keep == "memory":
            layer.forget_kept()
    with_sum = {id(layer.base_layer) for layer in layers if isinstance(layer, SpectralLinear)}
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and id(module) not in with_sum:
            module.keep_dense = keep == "speed"


def renew_kept(model: nn.Module) -> None:
    """Bring the dense weights that keep="speed" keeps up to date in place, so that recorded passes find them where they were."""
    for layer in adapted_layers(model).values():
        layer.renew_kept()
