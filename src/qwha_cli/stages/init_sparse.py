"""The init stage's work on one layer when the adapter is sparse: F from the quantization error, and the layer's record.

Everything is in the Hadamard domain, where F's entries are: the error (W − Q̂) H and the Gram matrix Hᵀ G H.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from qwha_cli import catalog
from qwha_cli.adapters.build import as_stored
from qwha_cli.artifacts.blocks import Record
from qwha_cli.errors import NumericsError
from qwha_cli.initializers.budget import InitOptions
from qwha_cli.initializers.refine import residual_error
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.wht import wht
from qwha_cli.quant.gram import Gram
from qwha_cli.recipe.schema import Recipe
from qwha_cli.report.entries import rows_by_entries
from qwha_cli.stages.init_layer import InitLayer

Initialize = Callable[..., SparseRows]


def initialize_sparse(recipe: Recipe, layer: InitLayer, gram: Gram) -> tuple[SparseRows, Record]:
    """Compute the places and values of one layer.

    Args:
        recipe: Its sections adapter and init are read.
        layer: The layer.
        gram: Of the layer's inputs.

    Returns:
        F, rounded as it will be stored, whose product with the adapter's scale is the update; the layer's line in layers.jsonl.

    Raises:
        NumericsError: Numbers that are not finite; with the layer's name.
    """
    started = time.monotonic()
    options = init_options(recipe)
    gram_h = gram.in_hadamard_basis().matrix.to(options.torch_dtype)
    weight_h = wht(layer.weight.detach().to(device=gram.device, dtype=options.torch_dtype))
    dense = layer.dense(torch.float32).to(device=gram.device, dtype=options.torch_dtype)
    delta = weight_h - (dense if layer.basis == "hadamard" else wht(dense))
    out_features, in_features = layer.shape
    budget = min(recipe.adapter.rank * (in_features + out_features), in_features * out_features)
    initialize = cast(Initialize, catalog.load(catalog.INITIALIZERS[recipe.init.method]))
    try:
        places = initialize(delta, gram_h, budget=budget, options=options)
    except NumericsError as error:
        raise NumericsError(error.message, where=f"layer {layer.name}", remedy=error.remedy) from error
    energy = _energy(weight_h, gram_h)
    scale = recipe.adapter.scale
    rows = as_stored(places.with_values(places.values / scale), recipe.adapter.store)
    counts = places.counts()
    record: Record = {
        "name": layer.name,
        "block": layer.target.block,
        "projection": layer.target.projection,
        "shape": [out_features, in_features],
        "entries": int(places.values.numel()),
        "entries_min": int(counts.min()),
        "entries_median": int(counts.median()),
        "entries_max": int(counts.max()),
        "entries_histogram": rows_by_entries(counts.tolist()).to_json(),
        "error_zero": _energy(delta, gram_h) / energy,
        "error_after": residual_error(delta, rows.with_values(rows.values * scale), gram_h) / energy,
        "seconds": round(time.monotonic() - started, 4),
    }
    return rows, record


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


def _energy(matrix: Tensor, gram: Tensor) -> float:
    """tr(M G Mᵀ), the squared output norm of a matrix (out, in) over the calibration inputs."""
    return float(((matrix @ gram) * matrix).sum(dtype=torch.float64))
