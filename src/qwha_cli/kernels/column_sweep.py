"""One pass over a few neighbouring columns of a weight, rounding each in turn while the others make good its error.

Two sweeps share the pattern "round a column, then a rank-one update of the columns of this block":

    feedback (GPTQ)      v = rest_j;                          e = (v − s(c − z)) / U_jj;        rest_k −= e U_jk   for k > j
    descent              v = q_j + slope_j / G_jj;            e = s(c − z) − q_j;               slope_k −= e G_jk  for all k

with c the nearest code of v, s and z the scale and zero of j's group, U the Cholesky factor of the inverse Gram matrix, and slope
the block's part of E G, E = W − Q. `descent` minimises tr(E G Eᵀ) over one column after the other: it never gets worse.

Everything is transposed, (columns, rows): a column of the weight is contiguous, and rows never interact. `scales` and `zeros` are
those of every column's group. The steps inside a block depend on one another, so this is the one place of quantization that is no
matrix product: column_sweep_torch.py is the reference, column_sweep_triton.py keeps a block of columns in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels import column_sweep_torch
from qwha_cli.kernels.backend import Requested, choose

OP = "column_sweep"


def feedback_sweep(
    rest: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, backend: Requested = "auto"
) -> tuple[Tensor, Tensor]:
    """Round the columns of a block one by one, GPTQ's error feedback between them.

    Args:
        rest: float32 (columns, rows), the weight's columns as earlier blocks left them; not written into.
        factor: float32 (columns, columns), the block of the upper triangular U.
        scales: float32 (columns, rows), positive.
        zeros: float32 (columns, rows).
        bits: Bits a code.
        backend: Which implementation.

    Returns:
        codes uint8 (columns, rows), and the errors e float32 (columns, rows) that later blocks must make good.

    Raises:
        KernelError: Shapes that do not fit, or a backend that this machine does not have.
    """
    _check(rest, factor, scales, zeros)
    if choose(backend, op=OP, device=rest.device).name == "triton":
        from qwha_cli.kernels import column_sweep_triton

        return column_sweep_triton.feedback_sweep(rest, factor, scales, zeros, bits=bits)
    return column_sweep_torch.feedback_sweep(rest, factor, scales, zeros, bits=bits)


def descent_sweep(
    slope: Tensor, gram: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, backend: Requested = "auto"
) -> tuple[Tensor, Tensor]:
    """Choose the codes of a block's columns anew, one by one, all others as they are.

    Args:
        slope: float32 (columns, rows), the block of (E G)ᵀ; not written into.
        gram: float32 (columns, columns), the diagonal block of G; its diagonal positive.
        codes: uint8 (columns, rows).
        scales: float32 (columns, rows), positive.
        zeros: float32 (columns, rows).
        bits: Bits a code.
        backend: Which implementation.

    Returns:
        The new codes uint8 (columns, rows), and by how much the values changed, float32 (columns, rows).

    Raises:
        KernelError: Shapes that do not fit, or a backend that this machine does not have.
    """
    _check(slope, gram, scales, zeros)
    if choose(backend, op=OP, device=slope.device).name == "triton":
        from qwha_cli.kernels import column_sweep_triton

        return column_sweep_triton.descent_sweep(slope, gram, codes, scales, zeros, bits=bits)
    return column_sweep_torch.descent_sweep(slope, gram, codes, scales, zeros, bits=bits)


def _check(state: Tensor, square: Tensor, scales: Tensor, zeros: Tensor) -> None:
    columns = state.shape[0]
    if square.shape != (columns, columns) or scales.shape != state.shape or zeros.shape != state.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (state, square, scales, zeros))
        raise KernelError(f"a block of {columns} columns needs matching shapes, got {shapes}", where=OP)
    if any(t.dtype != torch.float32 for t in (state, square, scales, zeros)):
        raise KernelError("the sweep computes in float32", where=OP)
