"""Codes to numbers in Triton, and the kernel that writes a weight with or without the entries of F; see dequantize.py.

A weight is written dense, or as the 8-bit numbers of weight_fp8.py, as it is or turned.

A program takes some rows and a span of their columns, tile by tile. Words lie (words, out) and weights (out, in), so a tile is
read along the outputs and written along the inputs; the words, not the numbers, change hands between threads. Products of a scale
and a code minus zero are exact in float32, so that no order of operations changes a bit.

Entries of F are written after the tiles: a program's threads wait for each other, compute base + value at their entries' places
anew, rounded once, and overwrite what lies there, while it is in the cache. Which entries lie in a program's rows and span is
looked up; the first of them are read before the tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize_cut import Config
from qwha_cli.kernels.fp8_triton import inverse_of
from qwha_cli.kernels.places import Places


@dataclass(frozen=True)
class Form:
    """In which form a weight is written.

    Args:
        kind: "dense"; "rows", in 8 bits with a scale a row; "turned", the transpose in 8 bits with one scale.
        scales: (out,) or () float32: those scales.
        same: Where a turned weight's scale is written for every column (in,).
    """

    kind: Literal["dense", "rows", "turned"]
    scales: Tensor
    same: Tensor


def launch(
    weight: Tensor,
    base: Codes | Tensor | None,
    entries: tuple[Tensor, Places, float] | None,
    config: Config,
    form: Form | None = None,
) -> None:
    """Write a weight.

    Args:
        weight: (out, in), contiguous, written as a whole; (in, out) where it is turned.
        base: (out, in), contiguous where it is a tensor; None for zeros.
        entries: Values (nnz,) of F, their places and the factor on them, to be added; None for none.
        config: How.
        form: None for a dense one.
    """
    form = form or Form("dense", weight, weight)
    rows, columns = weight.shape[::-1] if form.kind == "turned" else weight.shape
    # plain division: triton.cdiv is a kernel's function, and takes ten microseconds when Python calls it
    span = config.span if 0 < config.span < columns else -(-columns // config.columns) * config.columns
    grid = (-(-rows // config.rows), -(-columns // span))
    lists, slots = lists_of(entries, weight, span, rows * grid[1])
    tensors, strides, kind = operands(base, weight)
    _write[grid](
        weight, form.scales, form.same, *tensors, *lists, rows, columns, span, *strides,
        **kind, UNIT=min(kind["GROUP"] & -kind["GROUP"], config.columns), SPARSE=entries is not None, FORM=form.kind,
        ROWS=config.rows, COLUMNS=config.columns, SLOTS=slots, STAGES=config.stages,
        # a fused product and sum would round otherwise than torch
        num_warps=config.warps, enable_fp_fusion=False,
    )  # fmt: skip


def lists_of(
    entries: tuple[Tensor, Places, float] | None, filler: Tensor, span: int, spans: int
) -> tuple[tuple[Tensor, Tensor, Tensor, float], int]:
    """Entries as kernels take them that cut rows into spans, so many together; and how many of a span are taken at once."""
    if entries is None:
        return (filler, filler, filler, 0.0), 16
    values, places, factor = entries
    # somewhat more than lie in a row's span on average
    slots = min(max(triton.next_power_of_2(5 * len(places) // (4 * spans) + 1), 16), 128)
    return (values, places.span_starts(span), places.columns, factor), slots


def operands(base: Codes | Tensor | None, filler: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int], dict[str, Any]]:
    """A base as kernels take it: three tensors, the strides of codes and zeros, and what is known before a kernel runs."""
    if isinstance(base, Codes):
        # a span of a matrix's rows lies between others
        strides = (base.codes.stride(0), base.zeros.stride(0)) if base.layout == "gptq" else (0, 0)
        kind = {"KIND": base.layout, "BITS": base.bits, "ZERO_BITS": base.zero_bits, "GROUP": base.group_size}
        return base.tensors, strides, kind
    name = "zeros" if base is None else "dense"
    tensors = (filler if base is None else base, filler, filler)
    return tensors, (0, 0), {"KIND": name, "BITS": 0, "ZERO_BITS": 0, "GROUP": 1}


@triton.jit
def repeat(x, TIMES: tl.constexpr):
    """(a, b) to (a, b · TIMES), each column TIMES times."""
    wide = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], TIMES))
    return tl.reshape(wide, (x.shape[0], x.shape[1] * TIMES))


@triton.jit
def straddling(low, high, shift):
    """Three bits of two neighbouring 32-bit words, from bit `shift` of the first."""
    # in two steps, because a shift by 32 is not defined
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def word_at(ptr, row, word, stride, mask):
    """Words of codes, or of zeros."""
    return tl.load(ptr + word * stride + row, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _gptq_codes(ptr, row, inside, start, stride, columns, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of codes; zero outside of the matrix."""
    words = (columns * BITS + 31) // 32
    i = tl.arange(0, COLUMNS)
    if BITS == 3:
        # eight codes are 24 bits, of one word or two: these change hands, eight at a time
        eight = tl.arange(0, COLUMNS // 8)
        word = (start // 32 * 3 + eight * 3 // 4)[None, :]
        low = word_at(ptr, row, word, stride, inside & (word < words))
        high = word_at(ptr, row, word + 1, stride, inside & (word + 1 < words))
        found = repeat(straddling(low, high, (eight * 24 % 32)[None, :].to(tl.uint32)), 8)
        found = found >> ((i % 8) * 3)[None, :].to(tl.uint32)
    else:
        per: tl.constexpr = 32 // BITS
        word = (start // per + tl.arange(0, COLUMNS // per))[None, :]
        found = repeat(word_at(ptr, row, word, stride, inside & (word < words)), per)
        found = found >> ((i % per) * BITS)[None, :].to(tl.uint32)
    return found & ((1 << BITS) - 1)


@triton.jit
def gptq_grid(scales_ptr, zeros_ptr, row, group, inside, rows, stride, zero_stride, BITS: tl.constexpr, ZERO_BITS: tl.constexpr):
    """Scales, and minus scale times zero, both exact in float32."""
    scale = tl.load(scales_ptr + group * stride + row, mask=inside, other=0.0).to(tl.float32)
    words = (rows * ZERO_BITS + 31) // 32
    bit = row * ZERO_BITS
    word, shift = bit // 32, (bit % 32).to(tl.uint32)
    zero = word_at(zeros_ptr, word, group, zero_stride, inside)
    if ZERO_BITS == 3:
        zero = straddling(zero, word_at(zeros_ptr, word + 1, group, zero_stride, inside & (word + 1 < words)), shift)
    else:
        zero = zero >> shift
    zero = (zero & ((1 << ZERO_BITS) - 1)).to(tl.float32) * (1.0 / (1 << (ZERO_BITS - BITS)))
    return scale, -(scale * zero)


@triton.jit
def _tile(
    base_ptr, scales_ptr, zeros_ptr, row, inside, start, rows, columns, stride, zero_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the base in float32; row and inside are (ROWS, 1), start its first column."""
    column = start + tl.arange(0, COLUMNS)[None, :]
    place = row.to(tl.int64) * columns + column
    known = inside & (column < columns)
    if KIND == "zeros":
        return tl.zeros(known.shape, tl.float32)
    elif KIND == "dense":
        return tl.load(base_ptr + place, mask=known, other=0.0).to(tl.float32)
    else:
        unit = start + (tl.arange(0, COLUMNS // UNIT) * UNIT)[None, :]
        in_units = inside & (unit < columns)
        if KIND == "gptq":
            code = _gptq_codes(base_ptr, row, inside, start, stride, columns, BITS, COLUMNS)
            scale, shift = gptq_grid(
                scales_ptr, zeros_ptr, row, unit // GROUP, in_units, rows, stride, zero_stride, BITS, ZERO_BITS
            )
            return tl.fma(code.to(tl.float32), repeat(scale, UNIT), repeat(shift, UNIT))
        else:
            # a row is whole groups, and groups are even: so shifts and halves are known before the kernel runs
            byte_at = start // 2 + tl.arange(0, COLUMNS // 2)[None, :]
            half = columns // 2
            byte = tl.load(base_ptr + row.to(tl.int64) * half + byte_at, mask=inside & (byte_at < half), other=0)
            code = (repeat(byte, 2).to(tl.int32) >> (4 - 4 * (tl.arange(0, COLUMNS) % 2))[None, :]) & 15
            scale = tl.load(scales_ptr + row.to(tl.int64) * (columns // GROUP) + unit // GROUP, mask=in_units, other=0.0)
            return tl.load(zeros_ptr + code) * repeat(scale, UNIT)


@triton.jit
def _at(
    base_ptr, scales_ptr, zeros_ptr, row, column, mask, rows, columns, stride, zero_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The base at single places, in float32."""
    place = row.to(tl.int64) * columns + column
    if KIND == "zeros":
        return tl.zeros(column.shape, tl.float32)
    elif KIND == "dense":
        return tl.load(base_ptr + place, mask=mask, other=0.0).to(tl.float32)
    elif KIND == "gptq":
        word, shift = column * BITS // 32, (column * BITS % 32).to(tl.uint32)
        code = word_at(base_ptr, row, word, stride, mask)
        if BITS == 3:
            more = word_at(base_ptr, row, word + 1, stride, mask & (word + 1 < (columns * BITS + 31) // 32))
            code = straddling(code, more, shift)
        else:
            code = code >> shift
        code = (code & ((1 << BITS) - 1)).to(tl.float32)
        scale, offset = gptq_grid(scales_ptr, zeros_ptr, row, column // GROUP, mask, rows, stride, zero_stride, BITS, ZERO_BITS)
        return tl.fma(code, scale, offset)
    else:
        byte = tl.load(base_ptr + place // 2, mask=mask, other=0).to(tl.int32)
        code = (byte >> (4 - 4 * (column % 2))) & 15
        return tl.load(zeros_ptr + code) * tl.load(scales_ptr + place // GROUP, mask=mask, other=0.0)


@triton.jit
def entries_of(values_ptr, columns_ptr, begin, end, start, factor, SLOTS: tl.constexpr):
    """SLOTS entries of each row from its entry `start` on: which there are, their columns, and their values times the factor."""
    entry = begin + start + tl.arange(0, SLOTS)[None, :]
    mask = entry < end
    column = tl.load(columns_ptr + entry, mask=mask, other=0).to(tl.int32)
    value = tl.load(values_ptr + entry, mask=mask, other=0.0).to(tl.float32) * factor
    return mask, column, value


@triton.jit
def span_of(starts_ptr, row, inside):
    """Where the entries of rows begin and end in a program's span; the ranges of all rows and spans lie one behind the other."""
    range_ptr = starts_ptr + row * tl.num_programs(1) + tl.program_id(1)
    return tl.load(range_ptr, mask=inside, other=0), tl.load(range_ptr + 1, mask=inside, other=0)


@triton.jit
def add_entries(
    weight_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, columns_ptr, begin, end, mask, column, value, factor, inverse,
    row, rows, columns, stride, zero_stride, down, along,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Overwrite what a program has written at its entries' places; mask, column and value are of the first."""
    tl.debug_barrier()
    most = tl.max(end - begin)
    for start in range(0, most, SLOTS):
        value += _at(
            base_ptr, scales_ptr, zeros_ptr, row, column, mask, rows, columns, stride, zero_stride, KIND, BITS, ZERO_BITS, GROUP
        )
        entry_ptr = weight_ptr + row.to(tl.int64) * down + column.to(tl.int64) * along
        tl.store(entry_ptr, (value * inverse).to(weight_ptr.dtype.element_ty), mask=mask)
        mask, column, value = entries_of(values_ptr, columns_ptr, begin, end, start + SLOTS, factor, SLOTS)


@triton.jit
def _write(
    weight_ptr, form_ptr, same_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, columns_ptr, factor,
    rows, columns, span, stride, zero_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    SPARSE: tl.constexpr, FORM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    # steps in memory from row to row, and from column to column
    down, along = columns, 1
    inverse = 1.0
    if FORM == "rows":
        inverse = inverse_of(tl.load(form_ptr + row, mask=inside, other=1.0))
    elif FORM == "turned":
        down, along = 1, rows
        whole = tl.load(form_ptr)
        inverse = inverse_of(whole)
    first = tl.program_id(1) * span
    if SPARSE:
        begin, end = span_of(starts_ptr, row, inside)
        mask, column, value = entries_of(values_ptr, columns_ptr, begin, end, 0, factor, SLOTS)
    for start in tl.range(first, tl.minimum(first + span, columns), COLUMNS, num_stages=STAGES):
        tile = _tile(
            base_ptr, scales_ptr, zeros_ptr, row, inside, start, rows, columns, stride, zero_stride,
            KIND, BITS, ZERO_BITS, GROUP, UNIT, COLUMNS,
        )  # fmt: skip
        at = start + tl.arange(0, COLUMNS)[None, :]
        tile_ptr = weight_ptr + row.to(tl.int64) * down + at.to(tl.int64) * along
        tl.store(tile_ptr, (tile * inverse).to(weight_ptr.dtype.element_ty), mask=inside & (at < columns))
        if FORM == "turned":
            # the programs of the first rows do it for all
            column_at = start + tl.arange(0, COLUMNS)
            mine = column_at < tl.where(tl.program_id(0) == 0, columns, 0)
            tl.store(same_ptr + column_at, tl.zeros([COLUMNS], tl.float32) + whole, mask=mine)
    if SPARSE:
        add_entries(
            weight_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, columns_ptr, begin, end, mask, column, value, factor,
            inverse, row, rows, columns, stride, zero_stride, down, along, KIND, BITS, ZERO_BITS, GROUP, SLOTS,
        )  # fmt: skip
