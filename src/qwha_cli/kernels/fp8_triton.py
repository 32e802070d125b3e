"""Matrices to 8-bit numbers, and 8-bit matrices transposed, in Triton, each in one pass over memory; see fp8.py.

`scale_of`, `inverse_of` and `fitting` are for kernels that write 8-bit numbers of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.fp8 import E4M3, EXPONENTS, LARGEST

_LARGEST = tl.constexpr(LARGEST)
_LOWEST, _HIGHEST = tl.constexpr(EXPONENTS[0]), tl.constexpr(EXPONENTS[1])

# measured on an H100: a tile this large is read and written at 0.9 of a copy's speed
_ROWS, _COLUMNS, _WARPS = 64, 128, 4


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values (rows, columns) e4m3 and scales (rows,) of `fp8.to_fp8`."""
    values, scales = _room(x)
    _launch(x, values, scales, (scales, scales, scales), moved=False)
    return values, scales


def to_fp8_by(x: Tensor, by: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `to_fp8`, and the scales times powers of two (rows,), and the largest of those (), for `transposed`."""
    values, scales = _room(x)
    moved = torch.empty_like(scales)
    # a float32 number that is not negative is ordered as its bits are
    whole = torch.zeros((), dtype=torch.float32, device=x.device)
    _launch(x, values, scales, (by.contiguous(), moved, whole.view(torch.int32)), moved=True)
    return values, scales, moved, whole


def _room(x: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=E4M3, device=x.device)
    return values, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def _launch(x: Tensor, values: Tensor, scales: Tensor, others: tuple[Tensor, Tensor, Tensor], *, moved: bool) -> None:
    rows, columns = x.shape
    span = triton.next_power_of_2(max(columns, 16))
    if rows:
        # x may lie on another device than the current one
        with torch.cuda.device_of(x):
            _to_fp8[(rows,)](
                x.contiguous(), values, scales, *others, columns, MOVED=moved, SPAN=span,
                num_warps=min(16, max(4, span // 1024)),
            )  # fmt: skip


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
def scale_of(bound):
    """The smallest scale with which numbers up to `bound` fit, infinity if there is none, and one over the largest such scale."""
    found = ((bound / _LARGEST).to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    exponent = tl.minimum(tl.maximum(found, _LOWEST), _HIGHEST)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    # 255 << 23 is infinity
    return (tl.where(found > _HIGHEST, 255, exponent) << 23).to(tl.float32, bitcast=True), inverse


@triton.jit
def inverse_of(scale):
    """One over a scale, exactly; over the largest there is where it is infinite."""
    exponent = tl.minimum(tl.maximum(scale.to(tl.int32, bitcast=True) >> 23, _LOWEST), _HIGHEST)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fitting(scaled):
    """Numbers in the range of e4m3, what is none staying none."""
    return tl.clamp(scaled, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _to_fp8(
    x_ptr, values_ptr, scales_ptr, by_ptr, moved_ptr, whole_ptr, columns, MOVED: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, SPAN)
    place = row.to(tl.int64) * columns + at
    x = tl.load(x_ptr + place, mask=at < columns, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), axis=0))
    tl.store(values_ptr + place, fitting(x * inverse).to(tl.float8e4nv), mask=at < columns)
    tl.store(scales_ptr + row, scale)
    if MOVED:
        scale *= tl.load(by_ptr + row)
        tl.store(moved_ptr + row, scale)
        tl.atomic_max(whole_ptr, scale.to(tl.int32, bitcast=True))


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
