"""AdaAlloc's places with values of zero: the adapted model starts as the quantized base, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.initializers.adaalloc import adaalloc_places
from qwha_cli.initializers.budget import InitOptions
from qwha_cli.kernels.sparse_matmul import SparseRows


def initialize(delta: Tensor, gram: Tensor, *, budget: int, options: InitOptions) -> SparseRows:
    """Choose places as AdaAlloc does and set every value to zero.

    Args:
        delta: (out, in), float32 or float64, in the adapter's domain.
        gram: (in, in), in the adapter's domain, same device.
        budget: Entries of F, exactly.
        options: temperature, min_per_row and dtype are read.

    Returns:
        F with `budget` entries, all 0.

    Raises:
        NumericsError: A budget that does not fit, or numbers that are not finite.
    """
    places = adaalloc_places(delta, gram, budget=budget, options=options)
    return places.with_values(torch.zeros_like(places.values))
