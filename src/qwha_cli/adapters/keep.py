"""How long dense weights stay: for a pass, for a block's recomputation and backward pass, or until the next optimizer step.

    memory   made for each pass, three times a forward with recomputed activations and twice without
    block    made twice, with recomputed activations: the backward pass of a block finds those of its recomputation
    speed    made once an optimizer step, however many forwards it has

Layers that multiply 8-bit numbers write the form that a pass reads straight from the codes: `block` is `memory` to them.

In memory a kept weight is as large as an unquantized layer: with `block` there are one block's at a time, with `speed` all. The
result is the same. Which of them a device has room for is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        keep: How long dense weights stay.
        reason: One sentence for the run's notes.
    """

    keep: Keep
    reason: str


def choose_keep(
    requested: Literal["auto"] | Keep,
    model: nn.Module,
    *,
    dtype: torch.dtype,
    device: torch.device,
    recomputed: Sequence[nn.Module] = (),
    split: bool = False,
) -> KeepChoice:
    """Decide how long dense weights stay.

    Args:
        requested: What the recipe says; `auto` takes the longest for which they need a quarter of what is free on a CUDA device
            at most, so that the rest is left for activations.
        model: With packed linear layers, already on the device.
        dtype: In which the layers will compute.
        device: Where.
        recomputed: The modules whose activations are computed again in the backward pass, one module at a time; none without
            checkpointing, and then `block` is `memory`: all their weights would stay until the backward pass.
        split: Whether the base is split over several devices, which then have its codes one block at a time.
    """
    if requested == "block" and not recomputed:
        return KeepChoice(
            "memory", "dense weights are made for each pass: train.keep block is memory without train.checkpointing"
        )
    if requested == "auto" and split:
        return KeepChoice("memory", "dense weights are made for each pass: a split base has its codes here one block at a time")
    if requested != "auto":
        return KeepChoice(requested, f"train.keep {requested}, as the recipe asks")
    if device.type != "cuda":
        return KeepChoice("memory", f"dense weights are made for each pass: what is free on {device.type} is not known")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    dense = _dense_bytes(model, dtype)
    sizes = f"{dense / 2**30:.1f} GiB of them, {free / 2**30:.1f} GiB free"
    if dense * _KEPT_SHARE <= free:
        return KeepChoice("speed", f"dense weights are kept until the next optimizer step: {sizes}")
    block = max((_dense_bytes(module, dtype) for module in recomputed), default=0)
    if recomputed and block * _KEPT_SHARE <= free:
        sizes = f"{sizes}, and {block / 2**30:.2f} GiB are a block's"
        return KeepChoice("block", f"dense weights are kept from a block's recomputation to its backward pass: {sizes}")
    return KeepChoice("memory", f"dense weights are made for each pass: {sizes}")


def _dense_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(layer.out_features * layer.in_features for layer in layers) * dtype.itemsize


def set_keep(model: nn.Module, keep: Keep) -> None:
    """Choose for all layers how long dense weights stay; "block" is meant for a model under checkpointing.

    Beside a LoRA, and without an adapter, "speed" keeps the base's own dense weight.
    """
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.keep = keep
        if keep != "speed":
            layer.forget_kept()
    with_sum = {id(layer.base_layer) for layer in layers if isinstance(layer, SpectralLinear)}
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and id(module) not in with_sum:
            module.keep_dense = keep == "speed"


def renew_kept(model: nn.Module) -> None:
    """Bring the dense weights that keep="speed" keeps up to date in place, so that recorded passes find them where they were."""
    for layer in adapted_layers(model).values():
        layer.renew_kept()
