"""The init stage's work on one layer when the adapter is a LoRA: factors from the quantization error, and the layer's record.

Everything is in the weight basis, whatever basis the codes are in: B A multiplies the inputs as they come.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from qwha_cli import catalog
from qwha_cli.errors import NumericsError
from qwha_cli.initializers.budget import InitOptions
from qwha_cli.kernels.low_rank import LowRank
from qwha_cli.models.targets import Target
from qwha_cli.quant.error import layer_error
from qwha_cli.quant.gram import Gram
from qwha_cli.recipe.schema import Recipe

Factorize = Callable[..., LowRank]


def initialize_low_rank(
    recipe: Recipe, target: Target, *, weight: Tensor, base: Tensor, gram: Gram, options: InitOptions
) -> tuple[LowRank, dict[str, object]]:
    """Compute the factors of one layer.

    Args:
        recipe: adapter's rank and scale and init's method are read.
        target: The layer.
        weight: (out, in) of the 16-bit model, on any device.
        base: Q̂ (out, in) in the weight basis, on any device.
        gram: Of the layer's inputs.
        options: For the initializer; the seed is made the layer's own.

    Returns:
        B A whose product with the adapter's scale is the update; the layer's line in layers.jsonl.

    Raises:
        NumericsError: The rank does not fit, or numbers that are not finite; with the layer's name.
    """
    started = time.monotonic()
    dtype = options.torch_dtype
    weight, base = (tensor.detach().to(device=gram.device, dtype=dtype) for tensor in (weight, base))
    factorize = cast(Factorize, catalog.load(catalog.LOW_RANK_INITIALIZERS[recipe.init.method]))
    # one seed for all would give layers of one shape the same untrained factors
    own = dataclasses.replace(options, seed=zlib.crc32(f"{options.seed} {target.name}".encode()))
    try:
        factors = factorize(weight - base, gram.matrix, rank=recipe.adapter.rank, options=own)
    except NumericsError as error:
        raise NumericsError(error.message, where=f"layer {target.name}", remedy=error.remedy) from error
    matrix = gram.matrix.to(dtype)
    record: dict[str, object] = {
        "name": target.name,
        "block": target.block,
        "projection": target.projection,
        "shape": list(weight.shape),
        "rank": factors.rank,
        "entries": factors.num_values,
        "error_zero": layer_error(weight, base, matrix),
        "error_after": layer_error(weight, corrected_weight(base, factors), matrix),
        "seconds": round(time.monotonic() - started, 4),
    }
    return factors.divided(recipe.adapter.scale), record


def corrected_weight(base: Tensor, factors: LowRank, *, scale: float = 1.0) -> Tensor:
    """Q̂ + s B A (out, in), in the weight basis and the base's dtype and device."""
    update = factors.to(base.device, torch.promote_types(base.dtype, torch.float32)).dense()
    return base + (scale * update).to(base.dtype)
