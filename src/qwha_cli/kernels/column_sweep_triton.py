"""The column sweep in Triton: a program holds all columns of the block for a few rows in registers; see column_sweep.py.

Rows never interact, so a program runs through its columns without a barrier to any other. Taking column j out of registers is a
masked sum over the block: columns² · rows additions in all, a few ten microseconds for 128 columns, where the torch reference
takes nine kernel launches a column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32


def feedback_sweep(rest: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """As `column_sweep.feedback_sweep`."""
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    return codes, _launch(rest, factor, codes, scales, zeros, bits=bits, descent=False)


def descent_sweep(
    slope: Tensor, gram: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int
) -> tuple[Tensor, Tensor]:
    """As `column_sweep.descent_sweep`."""
    chosen = codes.clone(memory_format=torch.contiguous_format)
    return chosen, _launch(slope, gram, chosen, scales, zeros, bits=bits, descent=True)


def _launch(state: Tensor, square: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, descent: bool) -> Tensor:
    columns, rows = state.shape
    changes = torch.empty(state.shape, dtype=torch.float32, device=state.device)
    grid = (triton.cdiv(rows, _ROWS),)
    _sweep[grid](
        state.contiguous(),
        square.contiguous(),
        codes,
        scales.contiguous(),
        zeros.contiguous(),
        changes,
        columns,
        rows,
        TOP=(1 << bits) - 1,
        DESCENT=descent,
        COLUMNS=triton.next_power_of_2(columns),
        ROWS=_ROWS,
        num_warps=1,
    )
    return changes


@triton.jit
def _sweep(
    state_ptr,
    square_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    changes_ptr,
    columns,
    rows,
    TOP: tl.constexpr,
    DESCENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    place = column[:, None] * rows + row[None, :]
    block = tl.load(state_ptr + place, mask=(column[:, None] < columns) & inside[None, :], other=0.0)
    for j in range(columns):
        value = tl.sum(tl.where(column[:, None] == j, block, 0.0), axis=0)
        line = tl.load(square_ptr + j * columns + column, mask=column < columns, other=0.0)
        pivot = tl.load(square_ptr + j * columns + j + tl.zeros((ROWS,), tl.int32))
        scale = tl.load(scales_ptr + j * rows + row, mask=inside, other=1.0)
        zero = tl.load(zeros_ptr + j * rows + row, mask=inside, other=0.0)
        now = value
        if DESCENT:
            now = (tl.load(codes_ptr + j * rows + row, mask=inside, other=0).to(tl.float32) - zero) * scale
            value = tl.div_rn(value, pivot) + now
        # div_rn, because codes must not depend on the backend
        code = tl.minimum(tl.maximum(tl.div_rn(value, scale) + zero, 0.0), TOP)
        # float32 has no digits behind the point at 1.5 · 2^23: this rounds halves to even, as torch does
        code = (code + 12582912.0) - 12582912.0
        found = (code - zero) * scale
        change = found - now if DESCENT else tl.div_rn(value - found, pivot)
        tl.store(codes_ptr + j * rows + row, code.to(tl.uint8), mask=inside)
        tl.store(changes_ptr + j * rows + row, change, mask=inside)
        block -= line[:, None] * change[None, :]
