"""Random places, shared evenly among the rows, with refined values: the paper's "random + refine" (Table 2).

What it shows is how much of an initialization's gain comes from the values alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.initializers.budget import InitOptions, allocate, select
from qwha_cli.initializers.refine import refine
from qwha_cli.kernels.sparse_matmul import SparseRows

# the paper's
_DAMPING = 1e-4


def initialize(delta: Tensor, gram: Tensor, *, budget: int, options: InitOptions) -> SparseRows:
    """Choose places at random and values by least squares.

    Args:
        delta: (out, in), float32 or float64, in the adapter's domain.
        gram: (in, in), in the adapter's domain, same device.
        budget: Entries of F, exactly; rows differ by one at most.
        options: seed, min_per_row, damping and dtype are read.

    Returns:
        F with `budget` entries, float32 values.

    Raises:
        NumericsError: A budget that does not fit, or a factorisation that failed.
    """
    alike = torch.ones(delta.shape[0], device=delta.device)
    counts = allocate(alike, budget, minimum=options.min_per_row, maximum=delta.shape[1])
    # drawn on the CPU: the same places on every device
    generator = torch.Generator().manual_seed(options.seed)
    scores = torch.rand(delta.shape, generator=generator).to(delta.device)
    places = SparseRows.from_mask(torch.zeros_like(scores), select(scores, counts))
    return refine(delta, gram, places, damping=options.damping_or(_DAMPING), dtype=options.torch_dtype)
