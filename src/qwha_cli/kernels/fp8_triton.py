"""Matrices to 8-bit numbers, and 8-bit matrices transposed, in Triton, each in one pass over memory; see fp8.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.fp8 import E4M3, EXPONENTS, LARGEST

# measured on an H100: a tile this large is read and written at 0.9 of a copy's speed
_ROWS, _COLUMNS, _WARPS = 64, 128, 4


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values (rows, columns) e4m3 and scales (rows,) of `fp8.to_fp8`."""
    x = x.contiguous()
    rows, columns = x.shape
    values = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    span = triton.next_power_of_2(max(columns, 16))
    if rows:
        # x may lie on another device than the current one
        with torch.cuda.device_of(x):
            _to_fp8[(rows,)](
                x, values, scales, columns, LARGEST=LARGEST, LOWEST=EXPONENTS[0], HIGHEST=EXPONENTS[1], SPAN=span,
                num_warps=min(16, max(4, span // 1024)),
            )  # fmt: skip
    return values, scales


def transposed(values: Tensor, scales: tuple[Tensor, Tensor] | None, *, padded: int) -> tuple[Tensor, Tensor]:
    """Values (columns, padded) and scales (columns,) of `fp8.transposed`, given scales and the largest, or of `fp8.turned`."""
    rows, columns = values.shape
    found = torch.empty(columns, padded, dtype=E4M3, device=values.device)
    same = torch.empty(columns, dtype=torch.float32, device=values.device)
    if padded:
        grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(padded, _ROWS))
        with torch.cuda.device_of(values):
            _transposed[grid](
                values, *(scales or (same, same)), found, same, rows, columns, padded,
                MOVED=scales is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip
    return found, same


@triton.jit
def _to_fp8(
    x_ptr, values_ptr, scales_ptr, columns,
    LARGEST: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, SPAN)
    place = row.to(tl.int64) * columns + at
    x = tl.load(x_ptr + place, mask=at < columns, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=0) / LARGEST
    found = (largest.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    exponent = tl.minimum(tl.maximum(found, LOWEST), HIGHEST)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.clamp(x * inverse, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values_ptr + place, scaled.to(tl.float8e4nv), mask=at < columns)
    # 255 << 23 is infinity
    tl.store(scales_ptr + row, (tl.where(found > HIGHEST, 255, exponent) << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["rows"])
def _transposed(
    values_ptr, scales_ptr, whole_ptr, found_ptr, same_ptr, rows, columns, padded,
    MOVED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(values_ptr + row[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0.0)
    whole = 1.0
    if MOVED:
        whole = tl.load(whole_ptr)
        factor = tl.load(scales_ptr + row, mask=row < rows, other=0.0) / whole
        values = (values.to(tl.float32) * factor[:, None]).to(tl.float8e4nv)
    if tl.program_id(1) == 0:
        tl.store(same_ptr + column, tl.zeros([COLUMNS], tl.float32) + whole, mask=column < columns)
    inside = (column < columns)[:, None] & (row < padded)[None, :]
    tl.store(found_ptr + column[:, None].to(tl.int64) * padded + row[None, :], tl.trans(values), mask=inside)
