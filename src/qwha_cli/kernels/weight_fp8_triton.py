"""A weight as 8-bit numbers in Triton: the scales in a kernel of their own, and the numbers, looked up.

A group has 2^bits numbers. They are rounded to 8 bits once and lie in a register or some, and a code picks its byte there, four
codes in one instruction (PTX: prmt). So a number costs an instruction or two, where making it anew takes seven, two conversions
among them. A program writes its tile four bytes at a time, along the row; or along the column, from four rows each, whose bytes
change places. Entries are written after it: by the same program, along the row, and by a kernel of their own where the tile takes
all registers. What does not lie in whole words, other layouts and groups of odd sizes, is left to dequantize_triton.py.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize_cut import TableCut, fp8_config_for, table_cut_for
from qwha_cli.kernels.dequantize_triton import (
    Form,
    add_entries,
    entries_of,
    gptq_grid,
    launch,
    operands,
    repeat,
    slots_for,
    span_of,
    straddling,
    word_at,
)
from qwha_cli.kernels.fp8 import E4M3
from qwha_cli.kernels.fp8_triton import inverse_of, scale_of
from qwha_cli.kernels.places import Places

_ROWS = 8
_WIDTH = 128
# codes that are picked from one number of 32 bits, or 24
_TOGETHER = {2: 16, 3: 8, 4: 8}
# as the other form cuts rows: its lists of entries serve both
_ENTRY_ROWS, _ENTRY_SPAN = 4, 1024


def weight_scales(base: Codes | Tensor, values: Tensor, places: Places, *, scale: float) -> tuple[Tensor, Tensor]:
    """As `weight_fp8.weight_scales`."""
    rows, columns = places.shape
    base = base.contiguous() if isinstance(base, Tensor) else base
    found = torch.empty(rows, dtype=torch.float32, device=values.device)
    # a float32 number that is not negative is ordered as its bits are
    whole = torch.zeros((), dtype=torch.float32, device=values.device)
    tensors, strides, kind = operands(base, found)
    with torch.cuda.device_of(values):
        _scales[(-(-rows // _ROWS),)](
            found, whole.view(torch.int32), *tensors, values.contiguous(), places.row_starts, scale, rows, columns, *strides,
            **kind, ROWS=_ROWS, WIDTH=_WIDTH, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return found, whole


def weight_fp8(
    base: Codes | Tensor, values: Tensor, places: Places, scales: tuple[Tensor, Tensor], *, scale: float, is_turned: bool
) -> tuple[Tensor, Tensor]:
    """As `weight_fp8.weight_fp8`."""
    rows, whole = scales
    base = base.contiguous() if isinstance(base, Tensor) else base
    shape = (places.shape[1], places.shape[0]) if is_turned else places.shape
    weight = torch.empty(shape, dtype=E4M3, device=values.device)
    same = torch.empty(shape[0], dtype=torch.float32, device=values.device) if is_turned else rows
    form = Form("turned", whole, same) if is_turned else Form("rows", rows, rows)
    entries = (values.contiguous(), places, scale) if len(places) else None
    with torch.cuda.device_of(values):
        if isinstance(base, Codes) and in_whole_words(base):
            launch_table(weight, base, entries, table_cut_for(base, is_turned=is_turned), form)
        else:
            launch(weight, base, entries, fp8_config_for(base, is_turned=is_turned), form)
    return weight, same


def in_whole_words(base: Codes) -> bool:
    """Whether numbers can be looked up: codes that are picked together are of one group, and rows and columns whole words."""
    if base.layout != "gptq" or base.bits not in _TOGETHER or base.shape[0] % 4 or base.shape[1] % 4:
        return False
    # of what divides a group, tiles are made
    return base.group_size & -base.group_size >= _TOGETHER[base.bits]


def launch_table(weight: Tensor, base: Codes, entries: tuple[Tensor, Places, float] | None, cut: TableCut, form: Form) -> None:
    """Write a weight in 8 bits; arguments as for `dequantize_triton.launch`, and a base that is `in_whole_words`."""
    rows, columns = base.shape
    span = min(cut.span, -(-columns // cut.columns) * cut.columns)
    grid = (-(-rows // cut.rows), -(-columns // span))
    tensors, strides, kind = operands(base, weight)
    how = {name: kind[name] for name in ("BITS", "ZERO_BITS", "GROUP")}
    tile = {"TOGETHER": _TOGETHER[base.bits], "ROWS": cut.rows, "COLUMNS": cut.columns, "num_warps": cut.warps}
    tile |= {"UNIT": min(base.group_size & -base.group_size, cut.columns), "ASM": os.environ.get("TRITON_INTERPRET") != "1"}
    four = weight.view(torch.int32)
    if form.kind == "rows":
        lists, slots = _lists(weight, entries, span, rows * grid[1])
        _rows[grid](
            weight, four, form.scales, *tensors, *lists, rows, columns, span, *strides,
            **how, **tile, SPARSE=entries is not None, SLOTS=slots, enable_fp_fusion=False,
        )  # fmt: skip
        return
    _turned[grid](four, form.scales, form.same, *tensors, rows, columns, span, *strides, **how, **tile, enable_fp_fusion=False)
    if entries is not None:
        grid = (-(-rows // _ENTRY_ROWS), -(-columns // _ENTRY_SPAN))
        lists, slots = _lists(weight, entries, _ENTRY_SPAN, rows * grid[1])
        _turned_entries[grid](
            weight, form.scales, *tensors, *lists, rows, columns, *strides,
            **how, ROWS=_ENTRY_ROWS, SLOTS=slots, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _lists(weight: Tensor, entries: tuple[Tensor, Places, float] | None, span: int, spans: int) -> tuple[tuple[Any, ...], int]:
    """Entries as kernels take them, and how many of a row's span at once."""
    if entries is None:
        return (weight, weight, weight, 0.0), 16
    values, places, factor = entries
    return (values, places.span_starts(span), places.columns, factor), slots_for(len(places), spans)


@triton.jit
def _pick(low, high, selector, ASM: tl.constexpr):
    """Four bytes of the eight in `low` and `high`, by four nibbles of `selector` below 8."""
    if ASM:
        found = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        found = low & 0
        for i in tl.static_range(4):
            which = (selector >> (4 * i)) & 7
            found |= ((tl.where(which < 4, low, high) >> ((which & 3) * 8)) & 255) << (8 * i)
    return found


@triton.jit
def _four(step, low, inverse, FIRST: tl.constexpr):
    """The numbers of four neighbouring codes as four bytes."""
    found = tl.zeros(step.shape, tl.int32)
    for i in tl.static_range(4):
        number = (low + step * (FIRST + i)) * inverse
        found |= number.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * i)
    return found


@triton.jit
def _picked(
    base_ptr, scales_ptr, zeros_ptr, row, inside, inverse, start, rows, columns, stride, zero_stride,
    BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, TOGETHER: tl.constexpr,
    COLUMNS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A tile's bytes: a tuple, whose element k holds codes 4k to 4k + 3 of every TOGETHER, int32 (ROWS, COLUMNS / TOGETHER)."""
    words = (columns * BITS + 31) // 32
    i = tl.arange(0, COLUMNS // TOGETHER)
    unit = start + (tl.arange(0, COLUMNS // UNIT) * UNIT)[None, :]
    step, low = gptq_grid(
        scales_ptr, zeros_ptr, row, unit // GROUP, inside & (unit < columns), rows, stride, zero_stride, BITS, ZERO_BITS
    )
    times: tl.constexpr = UNIT // TOGETHER
    a = repeat(_four(step, low, inverse, 0), times)
    if BITS == 2:
        word = (start // 16 + i)[None, :]
        x = word_at(base_ptr, row, word, stride, inside & (word < words)).to(tl.int32, bitcast=True)
        # every second code in a nibble of its own: of the lower eight codes, then of the upper
        e0, o0 = _pick(a, a, x & 0x3333, ASM), _pick(a, a, (x >> 2) & 0x3333, ASM)
        e1, o1 = _pick(a, a, (x >> 16) & 0x3333, ASM), _pick(a, a, (x >> 18) & 0x3333, ASM)
        first, second = _pick(e0, o0, 0x5140, ASM), _pick(e0, o0, 0x7362, ASM)
        found = (first, second, _pick(e1, o1, 0x5140, ASM), _pick(e1, o1, 0x7362, ASM))
    elif BITS == 3:
        b = repeat(_four(step, low, inverse, 4), times)
        word = (start // 32 * 3 + i * 3 // 4)[None, :]
        one = word_at(base_ptr, row, word, stride, inside & (word < words))
        two = word_at(base_ptr, row, word + 1, stride, inside & (word + 1 < words))
        x = straddling(one, two, (i * 24 % 32)[None, :].to(tl.uint32)).to(tl.int32, bitcast=True)
        found = (_pick(a, b, _apart(x), ASM), _pick(a, b, _apart(x >> 12), ASM))
    else:
        b, c = repeat(_four(step, low, inverse, 4), times), repeat(_four(step, low, inverse, 8), times)
        d = repeat(_four(step, low, inverse, 12), times)
        word = (start // 8 + i)[None, :]
        x = word_at(base_ptr, row, word, stride, inside & (word < words)).to(tl.int32, bitcast=True)
        found = (_of_sixteen(a, b, c, d, x, ASM), _of_sixteen(a, b, c, d, x >> 16, ASM))
    return found


@triton.jit
def _apart(x):
    """Four codes of three bits in a nibble each."""
    return (x & 7) | ((x & 0x38) << 1) | ((x & 0x1C0) << 2) | ((x & 0xE00) << 3)


@triton.jit
def _of_sixteen(a, b, c, d, x, ASM: tl.constexpr):
    """Four bytes of sixteen, by four nibbles."""
    selector = x & 0x7777
    # bytes of ones where a nibble's highest bit is set
    upper = _pick(x & 0, (x & 0) - 1, (x >> 1) & 0x4444, ASM)
    return (_pick(a, b, selector, ASM) & ~upper) | (_pick(c, d, selector, ASM) & upper)


@triton.jit
def _rows(
    weight_ptr, four_ptr, form_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, columns_ptr, factor,
    rows, columns, span, stride, zero_stride,
    BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, TOGETHER: tl.constexpr,
    SPARSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    inverse = inverse_of(tl.load(form_ptr + row, mask=inside, other=1.0))
    if SPARSE:
        begin, end = span_of(starts_ptr, row, inside)
        mask, column, value = entries_of(values_ptr, columns_ptr, begin, end, 0, factor, SLOTS)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, columns), COLUMNS):
        x = _picked(
            base_ptr, scales_ptr, zeros_ptr, row, inside, inverse, start, rows, columns, stride, zero_stride,
            BITS, ZERO_BITS, GROUP, UNIT, TOGETHER, COLUMNS, ASM,
        )  # fmt: skip
        # side by side in memory: the last index of two that are joined runs fastest
        tile = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3])) if TOGETHER == 16 else tl.join(x[0], x[1])
        at = start // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        place = row.to(tl.int64) * (columns // 4) + at
        tl.store(four_ptr + place, tl.reshape(tile, [ROWS, COLUMNS // 4]), mask=inside & (at < columns // 4))
    if SPARSE:
        add_entries(
            weight_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, columns_ptr, begin, end, mask, column, value, factor,
            inverse, row, rows, columns, stride, zero_stride, columns, 1, "gptq", BITS, ZERO_BITS, GROUP, SLOTS,
        )  # fmt: skip


@triton.jit
def _turned(
    four_ptr, form_ptr, same_ptr, base_ptr, scales_ptr, zeros_ptr, rows, columns, span, stride, zero_stride,
    BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, TOGETHER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    whole = tl.load(form_ptr)
    inverse = inverse_of(whole)
    row = tl.program_id(0) * ROWS + 4 * tl.arange(0, ROWS // 4)[:, None]
    inside = row < rows
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, columns), COLUMNS):
        four = ()
        for k in tl.static_range(4):
            four += (_picked(
                base_ptr, scales_ptr, zeros_ptr, row + k, inside, inverse, start, rows, columns, stride, zero_stride,
                BITS, ZERO_BITS, GROUP, UNIT, TOGETHER, COLUMNS, ASM,
            ),)  # fmt: skip
        at = start + (tl.arange(0, COLUMNS // TOGETHER) * TOGETHER)[None, :]
        for k in tl.static_range(TOGETHER // 4):
            # four rows of four columns turned into four columns of four rows
            a, b = _pick(four[0][k], four[1][k], 0x5140, ASM), _pick(four[0][k], four[1][k], 0x7362, ASM)
            c, d = _pick(four[2][k], four[3][k], 0x5140, ASM), _pick(four[2][k], four[3][k], 0x7362, ASM)
            turned = (_pick(a, c, 0x5410, ASM), _pick(a, c, 0x7632, ASM), _pick(b, d, 0x5410, ASM), _pick(b, d, 0x7632, ASM))
            for j in tl.static_range(4):
                place = (at + (4 * k + j)).to(tl.int64) * (rows // 4) + row // 4
                tl.store(four_ptr + place, turned[j], mask=inside & (at + (4 * k + j) < columns))
        # the programs of the first rows do it for all
        column_at = start + tl.arange(0, COLUMNS)
        mine = column_at < tl.where(tl.program_id(0) == 0, columns, 0)
        tl.store(same_ptr + column_at, tl.zeros([COLUMNS], tl.float32) + whole, mask=mine)


@triton.jit
def _turned_entries(
    weight_ptr, form_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, columns_ptr, factor,
    rows, columns, stride, zero_stride,
    BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    begin, end = span_of(starts_ptr, row, row < rows)
    mask, column, value = entries_of(values_ptr, columns_ptr, begin, end, 0, factor, SLOTS)
    add_entries(
        weight_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, columns_ptr, begin, end, mask, column, value, factor,
        inverse_of(tl.load(form_ptr)), row, rows, columns, stride, zero_stride, 1, rows, "gptq", BITS, ZERO_BITS, GROUP, SLOTS,
    )  # fmt: skip


@triton.jit
def _scales(
    found_ptr, whole_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, factor, rows, columns, stride, zero_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    at = tl.arange(0, WIDTH)[None, :]
    largest = tl.zeros([ROWS, WIDTH], tl.float32)
    if KIND == "dense":
        for start in range(0, columns, WIDTH):
            column = start + at
            mask = inside & (column < columns)
            largest = _larger(largest, tl.load(base_ptr + row.to(tl.int64) * columns + column, mask=mask, other=0.0))
    else:
        groups = columns // GROUP
        for start in range(0, groups, WIDTH):
            group = start + at
            mask = inside & (group < groups)
            if KIND == "gptq":
                step, low = gptq_grid(scales_ptr, zeros_ptr, row, group, mask, rows, stride, zero_stride, BITS, ZERO_BITS)
                largest = _larger(_larger(largest, low), low + step * ((1 << BITS) - 1.0))
            else:
                step = tl.load(scales_ptr + row.to(tl.int64) * groups + group, mask=mask, other=0.0)
                table = tl.load(zeros_ptr + tl.arange(0, 16))
                largest = _larger(largest, step * tl.max(tl.abs(table)))
    added = tl.zeros([ROWS, WIDTH], tl.float32)
    begin = tl.load(starts_ptr + row, mask=inside, other=0)
    end = tl.load(starts_ptr + row + 1, mask=inside, other=0)
    most = tl.max(end - begin)
    for start in range(0, most, WIDTH):
        entry = begin + start + at
        added = _larger(added, tl.load(values_ptr + entry, mask=entry < end, other=0.0).to(tl.float32) * factor)
    scale, _ = scale_of(tl.max(largest, axis=1) + tl.max(added, axis=1))
    which = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(found_ptr + which, scale, mask=which < rows)
    tl.atomic_max(whole_ptr, tl.max(tl.where(which < rows, scale, 0.0)).to(tl.int32, bitcast=True))


@triton.jit
def _larger(largest, numbers):
    return tl.maximum(largest, tl.abs(numbers.to(tl.float32)))
