"""Which adapted layers multiply 8-bit numbers in a training, and for how long."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass

from torch import nn

from qwha_cli.adapters.adapted_linear import AdaptedLinear, adapted_layers
from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.errors import UsageError
from qwha_cli.kernels.fp8 import MULTIPLE
from qwha_cli.kernels.fp8_products import fits_fp8

# of a 3B model on an H100, 512 take as long as in bf16 and 2,048 a fifth less
_WORTH_IT = 1024


@dataclass(frozen=True)
class Fp8Choice:
    """What was chosen, and why.

    Attributes:
        layers: Those that will.
        reasons: A sentence for the run's notes, or none.
    """

    layers: tuple[AdaptedLinear, ...] = ()
    reasons: tuple[str, ...] = ()


def choose_fp8(model: nn.Module, *, wanted: bool) -> Fp8Choice:
    """Find the layers whose products can be of 8-bit numbers.

    Args:
        model: With adapters.
        wanted: Whether it is trained in `precision: fp8`.

    Raises:
        UsageError: It is, and no layer is in the Hadamard basis, or has sizes that suit.
    """
    if not wanted:
        return Fp8Choice()
    found = adapted_layers(model).values()
    fitting = tuple(layer for layer in found if _fits(layer))
    if not fitting:
        raise UsageError(
            f"no adapted layer has 8-bit products: they need the Hadamard basis and sizes that are multiples of {MULTIPLE}",
            where="train.precision",
            remedy="use bf16, or quantize with quantize.basis=hadamard",
        )
    return Fp8Choice(fitting, (f"8-bit products in {len(fitting)} of {len(found)} adapted layers",))


def advice(tokens: float) -> str | None:
    """What to say of forwards of so many tokens on a GPU, if making 8-bit numbers takes as long there as they save."""
    if tokens >= _WORTH_IT:
        return None
    return (
        f"a forward has some {tokens:,.0f} tokens on each GPU, too few for 8-bit products to be faster: "
        "raise train.batch_size, set train.packing, or use precision bf16"
    )


def _fits(layer: AdaptedLinear) -> bool:
    """Whether it reads transforms, which have no outliers, and has sizes that tensor cores take."""
    shape = (layer.out_features, layer.in_features)
    return isinstance(layer, SpectralLinear) and layer.basis == "hadamard" and fits_fp8(shape)


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
            # what it kept of weights in 8 bits
            layer.forget_kept()
