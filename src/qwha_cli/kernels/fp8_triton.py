"""Matrices to 8-bit numbers, and 8-bit matrices transposed, in Triton, each in one pass over memory; see fp8.py.

`scale_of`, `inverse_of` and `fitting` are for kernels that write 8-bit numbers of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.backend import interpreted
from qwha_cli.kernels.bytes_triton import quarter_turn
from qwha_cli.kernels.fp8 import E4M3, EXPONENTS, LARGEST

_LARGEST = tl.constexpr(LARGEST)
_LOWEST, _HIGHEST = tl.constexpr(EXPONENTS[0]), tl.constexpr(EXPONENTS[1])

# of thirteen sizes of a tile among the fastest for 1,024 to 8,192 columns (an H200)
_ROWS, _COLUMNS, _WARPS = 64, 128, 4
# rows' scales are compared in as many places: in one, thousands of rows wait for each other
_PLACES = 32


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values (rows, columns) e4m3 and scales (rows,) of `fp8.to_fp8`."""
    values, scales = _room(x)
    _launch(x, values, scales, (scales, scales, scales), moved=False)
    return values, scales


def to_fp8_by(x: Tensor, by: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `to_fp8`, and the scales times powers of two (rows,), and numbers the largest of which is theirs, for `transposed`."""
    values, scales = _room(x)
    moved = torch.empty_like(scales)
    # a float32 number that is not negative is ordered as its bits are
    whole = torch.zeros(_PLACES, dtype=torch.float32, device=x.device)
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
                x.contiguous(), values, scales, *others, columns, MOVED=moved, PLACES=_PLACES, SPAN=span,
                num_warps=min(16, max(4, span // 1024)),
            )  # fmt: skip


def transposed(values: Tensor, scales: tuple[Tensor, Tensor] | None, *, padded: int) -> tuple[Tensor, Tensor]:
    """Values (columns, padded) and scales (columns,) of `fp8.transposed`, or of `fp8.turned`.

    Args:
        values: (rows, columns), contiguous; columns a multiple of 4, as is `padded`.
        scales: (rows,), and numbers, as many as a power of two, the largest of which is the largest scale; None for `turned`.
        padded: Columns of the result.
    """
    rows, columns = values.shape
    found = torch.empty(columns, padded, dtype=E4M3, device=values.device)
    same = torch.empty(columns, dtype=torch.float32, device=values.device)
    moved, whole = scales or (same, same[:1])
    if padded:
        grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(padded, _ROWS))
        with torch.cuda.device_of(values):
            _transposed[grid](
                values.view(torch.int32), moved, whole, found.view(torch.int32), same, rows, columns, padded,
                MOVED=scales is not None, PLACES=whole.numel(), ROWS=_ROWS, COLUMNS=_COLUMNS,
                ASM=not interpreted(), num_warps=_WARPS,
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
    x_ptr, values_ptr, scales_ptr, by_ptr, moved_ptr, whole_ptr, columns,
    MOVED: tl.constexpr, PLACES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, SPAN)
    place = row.to(tl.int64) * columns + at
    if MOVED:
        # before the row, with which they are on their way; of the largest an old number will do
        by = tl.load(by_ptr + row)
        largest_ptr = whole_ptr + row % PLACES
        largest = tl.load(largest_ptr)
    x = tl.load(x_ptr + place, mask=at < columns, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), axis=0))
    tl.store(values_ptr + place, fitting(x * inverse).to(tl.float8e4nv), mask=at < columns)
    tl.store(scales_ptr + row, scale)
    if MOVED:
        scale *= by
        tl.store(moved_ptr + row, scale)
        bits = scale.to(tl.int32, bitcast=True)
        tl.atomic_max(largest_ptr, bits, mask=bits > largest)


_TIMES = tl.constexpr("""{
    .reg .b16 l, h;
    .reg .b32 a, b;
    mov.b32 {l, h}, $1;
    cvt.rn.f16x2.e4m3x2 a, l;
    cvt.rn.f16x2.e4m3x2 b, h;
    mul.f16x2 a, a, $2;
    mul.f16x2 b, b, $2;
    cvt.rn.satfinite.e4m3x2.f16x2 l, a;
    cvt.rn.satfinite.e4m3x2.f16x2 h, b;
    mov.b32 $0, {l, h};
}""")


@triton.jit
def _times(words, factor, ASM: tl.constexpr):
    """Four 8-bit numbers in each word times powers of two up to 1."""
    if ASM:
        # float16 is exact here: what it cannot hold of a power of two is far below what e4m3 can of the product
        half = factor.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        found = tl.inline_asm_elementwise(_TIMES, "=r,r,r", [words, half | (half << 16)], dtype=tl.int32, is_pure=True, pack=1)
    else:
        found = words & 0
        for i in tl.static_range(4):
            number = ((words >> (8 * i)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32) * factor
            found |= number.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * i)
    return found


# words of four neighbours go in, of four rows each, and come out as words of four rows
@triton.jit(do_not_specialize=["rows"])
def _transposed(
    values_ptr, scales_ptr, whole_ptr, found_ptr, same_ptr, rows, columns, padded,
    MOVED: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    word = tl.program_id(0) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    inside = word < columns // 4
    four = ()
    for k in tl.static_range(4):
        row = 4 * group + k
        place = row[:, None].to(tl.int64) * (columns // 4) + word[None, :]
        four += (tl.load(values_ptr + place, mask=(row < rows)[:, None] & inside[None, :], other=0),)
    whole = 1.0
    if MOVED:
        whole = tl.max(tl.load(whole_ptr + tl.arange(0, PLACES)), axis=0)
        moved = ()
        for k in tl.static_range(4):
            row = 4 * group + k
            factor = tl.load(scales_ptr + row, mask=row < rows, other=0.0) / whole
            moved += (_times(four[k], factor[:, None], ASM),)
        four = moved
    if tl.program_id(1) == 0:
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(same_ptr + column, tl.zeros([COLUMNS], tl.float32) + whole, mask=column < columns)
    turned = quarter_turn(four[0], four[1], four[2], four[3], ASM)
    for k in tl.static_range(4):
        place = (4 * word + k)[:, None].to(tl.int64) * (padded // 4) + group[None, :]
        tl.store(found_ptr + place, tl.trans(turned[k]), mask=inside[:, None] & (group < padded // 4)[None, :])
