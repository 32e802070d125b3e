"""The squared output error of a whole layer."""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.initializers.refine import row_errors
from qwha_cli.kernels.sparse_matmul import SparseRows


def residual_error(delta: Tensor, rows: SparseRows | None, gram: Tensor) -> float:
    """tr((D − F) G (D − F)ᵀ); F = 0 for rows = None."""
    return float(row_errors(delta, rows, gram).sum(dtype=torch.float64))
