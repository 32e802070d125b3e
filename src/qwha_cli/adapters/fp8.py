"""Which adapted layers multiply 8-bit numbers in a training, and for how long."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import nn

from qwha_cli.adapters.adapted_linear import AdaptedLinear, adapted_layers
from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.errors import UsageError
from qwha_cli.kernels.fp8 import MULTIPLE
from qwha_cli.kernels.fp8_products import FEWEST_TOKENS


@dataclass(frozen=True)
class Fp8Choice:
    """What was chosen, and why.

    Attributes:
        layers: Those that will.
        reasons: A sentence for the run's notes, or none.
    """

    layers: tuple[AdaptedLinear, ...] = ()
    reasons: tuple[str, ...] = ()


def choose_fp8(model: nn.Module, *, wanted: bool, tokens: int, device: torch.device) -> Fp8Choice:
    """Find the layers whose products can be of 8-bit numbers.

    Args:
        model: With adapters.
        wanted: Whether it is trained in `precision: fp8`.
        tokens: The most that a forward has on this device.
        device: Where it is trained.

    Raises:
        UsageError: No layer is in the Hadamard basis, or has sizes that suit; or no batch has tokens enough.
    """
    if not wanted:
        return Fp8Choice()
    if device.type == "cuda" and tokens < FEWEST_TOKENS:
        raise UsageError(
            f"8-bit products begin at {FEWEST_TOKENS:,} tokens a forward, and batches have {tokens:,} on each GPU at most",
            where="train.precision",
            remedy="use bf16, raise train.batch_size, or lower train.accumulation instead of it",
        )
    found = adapted_layers(model).values()
    fitting = tuple(layer for layer in found if _fits(layer))
    if not fitting:
        raise UsageError(
            f"no adapted layer has 8-bit products: they need the Hadamard basis and sizes that are multiples of {MULTIPLE}",
            where="train.precision",
            remedy="use bf16, or quantize with quantize.basis=hadamard",
        )
    reason = f"8-bit products in {len(fitting)} of {len(found)} adapted layers, on a GPU for {FEWEST_TOKENS:,} tokens or more"
    return Fp8Choice(fitting, (reason,))


def _fits(layer: AdaptedLinear) -> bool:
    """Whether it reads transforms, which have no outliers, and has sizes that tensor cores take."""
    sizes = (layer.in_features, layer.out_features)
    return isinstance(layer, SpectralLinear) and layer.basis == "hadamard" and not any(size % MULTIPLE for size in sizes)


@contextlib.contextmanager
def fp8_products(choice: Fp8Choice) -> Generator[None]:
    """Let the chosen layers multiply 8-bit numbers for the time of the block."""
    for layer in choice.layers:
        layer.fp8 = True
    try:
        yield
    finally:
        for layer in choice.layers:
            layer.fp8 = False
