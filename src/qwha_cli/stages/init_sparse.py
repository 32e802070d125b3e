"""The init stage's work on one layer when the adapter is sparse: F from the quantization error.

Everything is in the Hadamard domain, where F's entries are: the error (W − Q̂) H and the Gram matrix Hᵀ G H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from qwha_cli import catalog
from qwha_cli.adapters.build import as_stored
from qwha_cli.errors import NumericsError
from qwha_cli.initializers.budget import InitOptions
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.quant.gram import Gram
from qwha_cli.recipe.schema import Recipe
from qwha_cli.stages.init_layer import InitLayer

Initialize = Callable[..., SparseRows]


def initialize_sparse(
    recipe: Recipe, layer: InitLayer, gram: Gram, *, method: str | None = None, entries: int | None = None
) -> SparseRows:
    """Compute the places and values of one layer.

    Args:
        recipe: Its sections adapter and init are read.
        layer: The layer.
        gram: Of the layer's inputs.
        method: Another initializer than the recipe's.
        entries: Another number of entries than the rank gives.

    Returns:
        F, rounded as it will be stored, whose product with the adapter's scale is the update.

    Raises:
        NumericsError: Numbers that are not finite; with the layer's name.
    """
    options = init_options(recipe)
    gram_h = gram.in_hadamard_basis().matrix.to(options.torch_dtype)
    weight, base = layer.pair("hadamard", device=gram.device, dtype=options.torch_dtype)
    out_features, in_features = layer.shape
    budget = min(entries or recipe.adapter.rank * (in_features + out_features), in_features * out_features)
    initialize = cast(Initialize, catalog.load(catalog.INITIALIZERS[method or recipe.init.method]))
    try:
        places = initialize(weight - base, gram_h, budget=budget, options=options)
    except NumericsError as error:
        raise NumericsError(error.message, where=f"layer {layer.name}", remedy=error.remedy) from error
    return as_stored(places.with_values(places.values / recipe.adapter.scale), recipe.adapter.store)


def init_options(recipe: Recipe) -> InitOptions:
    """The recipe's section init as the initializers take it."""
    init = recipe.init
    return InitOptions(
        temperature=init.temperature,
        damping=init.damping,
        min_per_row=init.min_per_row,
        seed=recipe.seed,
        dtype=init.precision,
    )
