"""The init stage's work on one layer when the adapter is a LoRA: factors from the quantization error.

Everything is in the weight basis, whatever basis the codes are in: B A multiplies the inputs as they come.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import cast

from qwha_cli import catalog
from qwha_cli.errors import NumericsError
from qwha_cli.kernels.low_rank import LowRank
from qwha_cli.quant.gram import Gram
from qwha_cli.recipe.schema import Recipe
from qwha_cli.stages.init_layer import InitLayer
from qwha_cli.stages.init_sparse import init_options

Factorize = Callable[..., LowRank]


def initialize_low_rank(
    recipe: Recipe, layer: InitLayer, gram: Gram, *, method: str | None = None, rank: int | None = None
) -> LowRank:
    """Compute the factors of one layer.

    Args:
        recipe: Its sections adapter and init are read.
        layer: The layer.
        gram: Of the layer's inputs.
        method: Another initializer than the recipe's.
        rank: Another rank.

    Returns:
        B A whose product with the adapter's scale is the update.

    Raises:
        NumericsError: The rank does not fit, or numbers that are not finite; with the layer's name.
    """
    options = init_options(recipe)
    weight, base = layer.pair("weight", device=gram.device, dtype=options.torch_dtype)
    factorize = cast(Factorize, catalog.load(catalog.LOW_RANK_INITIALIZERS[method or recipe.init.method]))
    # one seed for all would give layers of one shape the same untrained factors
    own = dataclasses.replace(options, seed=zlib.crc32(f"{options.seed} {layer.name}".encode()))
    try:
        factors = factorize(weight - base, gram.matrix, rank=rank or recipe.adapter.rank, options=own)
    except NumericsError as error:
        raise NumericsError(error.message, where=f"layer {layer.name}", remedy=error.remedy) from error
    return factors.divided(recipe.adapter.scale)
