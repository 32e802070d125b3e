"""AdaAlloc: entries where the quantization error does most harm, values by least squares (paper §3.2, Eq. 7 to 9).

With D the delta and G the Gram matrix of the inputs, both in the adapter's domain: rows get entries in proportion to
‖(ΔW X)_i‖^t = (D G Dᵀ)_ii^(t/2), each row takes its largest |D_ij|, and the values are refined on G. The authors' code differs
from the paper in allocation, selection and the minimum (docs/method.md); this file follows the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.initializers.budget import InitOptions, allocate, select
from qwha_cli.initializers.refine import refine, row_errors
from qwha_cli.kernels.sparse_matmul import SparseRows

# the paper's
_DAMPING = 1e-4


def initialize(delta: Tensor, gram: Tensor, *, budget: int, options: InitOptions) -> SparseRows:
    """Choose places and values of F so that F approximates delta on the calibration inputs.

    Args:
        delta: (out, in), float32 or float64, in the adapter's domain.
        gram: (in, in), Gram matrix of the inputs in the adapter's domain, same device.
        budget: Entries of F, exactly.
        options: temperature, min_per_row, damping and dtype are read.

    Returns:
        F with `budget` entries, float32 values.

    Raises:
        NumericsError: A budget that does not fit, numbers that are not finite, a factorisation that failed.
    """
    places = adaalloc_places(delta, gram, budget=budget, options=options)
    return refine(delta, gram, places, damping=options.damping_or(_DAMPING), dtype=options.torch_dtype)


def adaalloc_places(delta: Tensor, gram: Tensor, *, budget: int, options: InitOptions) -> SparseRows:
    """AdaAlloc's allocation and selection; the values are delta's own at the chosen places.

    Args:
        delta: (out, in), in the adapter's domain.
        gram: (in, in), in the adapter's domain, same device.
        budget: Entries of F, exactly.
        options: temperature, min_per_row and dtype are read.

    Raises:
        NumericsError: A budget that does not fit, or numbers that are not finite.
    """
    # squares of small errors underflow in float32 before their root is taken: powers are taken in float64
    errors = row_errors(delta.to(options.torch_dtype), None, gram.to(options.torch_dtype)).to(torch.float64)
    counts = allocate(errors.sqrt() ** options.temperature, budget, minimum=options.min_per_row, maximum=delta.shape[1])
    return SparseRows.from_mask(delta.to(torch.float32), select(delta.abs(), counts))
