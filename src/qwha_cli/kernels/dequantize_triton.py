"""Codes to numbers in Triton, and the kernel that writes a weight with or without the entries of F; see dequantize.py.

A program takes some rows and a span of their columns, tile by tile. Words lie (words, out) and weights (out, in), so a tile is
read along the outputs and written along the inputs; the words, not the numbers, change hands between threads. Products of a scale
and a code minus zero are exact in float32, so that no order of operations changes a bit.

Entries of F are written after the tiles: a program's threads wait for each other, compute base + value at their entries' places
anew, rounded once, and overwrite what lies there, while it is in the cache. Columns outside of the span are passed over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.codes import Codes


@dataclass(frozen=True)
class Config:
    """How a weight is cut up.

    Args:
        rows: Rows of a program, a power of two.
        columns: Columns of a tile, a power of two, at least 32.
        span: Columns of a program, a multiple of `columns`; 0 for all.
        warps: Of a program.
        chunk: Entries of F at a time, a power of two.
        stages: Tiles whose loads are under way at once.
        split: Tiles and entries by two launches, not one.
    """

    rows: int = 16
    columns: int = 256
    span: int = 1024
    warps: int = 4
    chunk: int = 256
    stages: int = 1
    split: bool = False


CANDIDATES: tuple[Config, ...] = (
    *(
        Config(rows, columns, span, warps)
        for rows, columns in ((8, 256), (8, 512), (16, 128), (16, 256), (16, 512), (32, 128), (32, 256))
        for warps in (4, 8)
        for span in (1024, 4096, 0)
    ),
    *(Config(16, 256, 1024, 4, stages=stages) for stages in (2, 3)),
    *(Config(rows, 256, span, 4, split=True) for rows in (16, 32) for span in (256, 1024)),
)
"""What benchmarks/bench_effective_weight.py times; `config_for` takes from its results."""


def config_for(base: Codes | Tensor | None, shape: tuple[int, int]) -> Config:
    """The cut for a base: codes, a dense matrix, or None for zeros."""
    # few rows: smaller blocks of rows keep all processors busy
    return Config(rows=8) if shape[0] <= 2048 else Config()


def dequantize(codes: Codes, dtype: torch.dtype) -> Tensor:
    """As `dequantize.dequantize`, for float32, bfloat16 and float16."""
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    launch(weight, codes, None, config_for(codes, codes.shape))
    return weight


Entries = tuple[Tensor, Tensor, Tensor, float]
"""Values (nnz,), row_starts and columns of F, and the factor on the values."""


def launch(weight: Tensor, base: Codes | Tensor | None, entries: Entries | None, config: Config) -> None:
    """Write a weight.

    Args:
        weight: (out, in), contiguous, written as a whole.
        base: (out, in), contiguous where it is a tensor; None for zeros.
        entries: F, in addition; None for none.
        config: How.
    """
    if entries is not None and config.split:
        _launch(weight, base, entries, config, tiles=True, sparse=False)
        _launch(weight, base, entries, config, tiles=False, sparse=True)
    else:
        _launch(weight, base, entries, config, tiles=True, sparse=entries is not None)


def _launch(
    weight: Tensor, base: Codes | Tensor | None, entries: Entries | None, config: Config, *, tiles: bool, sparse: bool
) -> None:
    out_features, in_features = weight.shape
    # entries by themselves are read once, whatever the span
    span = config.span if config.span and tiles else triton.cdiv(in_features, config.columns) * config.columns
    grid = (triton.cdiv(out_features, config.rows), triton.cdiv(in_features, span))
    values, starts, columns, factor = entries if entries is not None else (weight, weight, weight, 0.0)
    if isinstance(base, Codes):
        tensors = (base.codes, base.scales, base.zeros)
        kind, bits, zero_bits, group = base.layout, base.bits, base.zero_bits, base.group_size
    else:
        tensors = (weight if base is None else base, weight, weight)
        kind, bits, zero_bits, group = "zeros" if base is None else "dense", 0, 0, 1
    # nf4's groups run on over the ends of rows
    unit = math.gcd(group, in_features) if kind == "nf4" else group
    _write[grid](
        weight, *tensors, values, starts, columns, factor, out_features, in_features, span,
        KIND=kind, BITS=bits, ZERO_BITS=zero_bits, GROUP=group, UNIT=min(unit & -unit, config.columns),
        PAIRED=in_features % 2 == 0, TILES=tiles, SPARSE=sparse, MANY_SPANS=grid[1] > 1,
        ROWS=config.rows, COLUMNS=config.columns, CHUNK=config.chunk, STAGES=config.stages,
        # a fused product and sum would round otherwise than torch
        num_warps=config.warps, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _repeat(x, TIMES: tl.constexpr):
    """(a, b) to (a, b · TIMES), each column TIMES times."""
    wide = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], TIMES))
    return tl.reshape(wide, (x.shape[0], x.shape[1] * TIMES))


@triton.jit
def _straddling(low, high, shift):
    """Three bits of two neighbouring 32-bit words, from bit `shift` of the first."""
    # in two steps, because a shift by 32 is not defined
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def _word(ptr, row, word, stride, mask):
    return tl.load(ptr + word * stride + row, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _gptq_codes(ptr, row, inside, start, rows, columns, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of codes; zero outside of the matrix."""
    words = (columns * BITS + 31) // 32
    i = tl.arange(0, COLUMNS)
    if BITS == 3:
        word = (start // 32 + tl.arange(0, COLUMNS // 32))[None, :] * 3
        first = _repeat(_word(ptr, row, word, rows, inside & (word < words)), 32)
        second = _repeat(_word(ptr, row, word + 1, rows, inside & (word + 1 < words)), 32)
        third = _repeat(_word(ptr, row, word + 2, rows, inside & (word + 2 < words)), 32)
        bit = ((i % 32) * 3)[None, :]
        low = tl.where(bit < 32, first, tl.where(bit < 64, second, third))
        found = _straddling(low, tl.where(bit < 32, second, third), (bit % 32).to(tl.uint32))
    else:
        per: tl.constexpr = 32 // BITS
        word = (start // per + tl.arange(0, COLUMNS // per))[None, :]
        found = _repeat(_word(ptr, row, word, rows, inside & (word < words)), per)
        found = found >> ((i % per) * BITS)[None, :].to(tl.uint32)
    return found & ((1 << BITS) - 1)


@triton.jit
def _gptq_grid(scales_ptr, zeros_ptr, row, group, inside, rows, BITS: tl.constexpr, ZERO_BITS: tl.constexpr):
    """Scales, and minus scale times zero, both exact in float32."""
    scale = tl.load(scales_ptr + group * rows + row, mask=inside, other=0.0).to(tl.float32)
    words = (rows * ZERO_BITS + 31) // 32
    bit = row * ZERO_BITS
    word, shift = bit // 32, (bit % 32).to(tl.uint32)
    zero = _word(zeros_ptr, word, group, words, inside)
    if ZERO_BITS == 3:
        zero = _straddling(zero, _word(zeros_ptr, word + 1, group, words, inside & (word + 1 < words)), shift)
    else:
        zero = zero >> shift
    zero = (zero & ((1 << ZERO_BITS) - 1)).to(tl.float32) * (1.0 / (1 << (ZERO_BITS - BITS)))
    return scale, -(scale * zero)


@triton.jit
def _tile(
    base_ptr, scales_ptr, zeros_ptr, row, inside, start, rows, columns,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    PAIRED: tl.constexpr, COLUMNS: tl.constexpr,
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
            code = _gptq_codes(base_ptr, row, inside, start, rows, columns, BITS, COLUMNS)
            scale, shift = _gptq_grid(scales_ptr, zeros_ptr, row, unit // GROUP, in_units, rows, BITS, ZERO_BITS)
            return tl.fma(code.to(tl.float32), _repeat(scale, UNIT), _repeat(shift, UNIT))
        else:
            if PAIRED:
                pair = start + (tl.arange(0, COLUMNS // 2) * 2)[None, :]
                byte = tl.load(base_ptr + (row.to(tl.int64) * columns + pair) // 2, mask=inside & (pair < columns), other=0)
                byte = _repeat(byte, 2)
            else:
                byte = tl.load(base_ptr + place // 2, mask=known, other=0)
            code = (byte.to(tl.int32) >> (4 - 4 * (place % 2)).to(tl.int32)) & 15
            scale = tl.load(scales_ptr + (row.to(tl.int64) * columns + unit) // GROUP, mask=in_units, other=0.0)
            return tl.load(zeros_ptr + code) * _repeat(scale, UNIT)


@triton.jit
def _at(
    base_ptr, scales_ptr, zeros_ptr, row, column, mask, rows, columns,
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
        code = _word(base_ptr, row, word, rows, mask)
        if BITS == 3:
            more = _word(base_ptr, row, word + 1, rows, mask & (word + 1 < (columns * BITS + 31) // 32))
            code = _straddling(code, more, shift)
        else:
            code = code >> shift
        code = (code & ((1 << BITS) - 1)).to(tl.float32)
        scale, offset = _gptq_grid(scales_ptr, zeros_ptr, row, column // GROUP, mask, rows, BITS, ZERO_BITS)
        return tl.fma(code, scale, offset)
    else:
        byte = tl.load(base_ptr + place // 2, mask=mask, other=0).to(tl.int32)
        code = (byte >> (4 - 4 * (place % 2)).to(tl.int32)) & 15
        return tl.load(zeros_ptr + code) * tl.load(scales_ptr + place // GROUP, mask=mask, other=0.0)


@triton.jit
def entry_rows(starts_ptr, first, entry, rows, ROWS: tl.constexpr):
    """The rows of entries that belong to the ROWS rows from `first` on."""
    row = first + tl.arange(0, ROWS)
    ends = tl.load(starts_ptr + 1 + row, mask=row < rows, other=2147483647)
    return first + tl.sum((entry[:, None] >= ends[None, :]).to(tl.int32), axis=1)


@triton.jit
def _write(
    weight_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, columns_ptr, factor, rows, columns, span,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    PAIRED: tl.constexpr, TILES: tl.constexpr, SPARSE: tl.constexpr, MANY_SPANS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, columns)
    if TILES:
        _write_tiles(
            weight_ptr, base_ptr, scales_ptr, zeros_ptr, first_row, first, last, rows, columns,
            KIND, BITS, ZERO_BITS, GROUP, UNIT, PAIRED, ROWS, COLUMNS, STAGES,
        )  # fmt: skip
    if TILES and SPARSE:
        tl.debug_barrier()
    if SPARSE:
        _write_entries(
            weight_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, columns_ptr, factor,
            first_row, first, last, rows, columns, KIND, BITS, ZERO_BITS, GROUP, MANY_SPANS, ROWS, CHUNK,
        )  # fmt: skip


@triton.jit
def _write_tiles(
    weight_ptr, base_ptr, scales_ptr, zeros_ptr, first_row, first, last, rows, columns,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    PAIRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = first_row + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    for start in tl.range(first, last, COLUMNS, num_stages=STAGES):
        tile = _tile(
            base_ptr, scales_ptr, zeros_ptr, row, inside, start, rows, columns,
            KIND, BITS, ZERO_BITS, GROUP, UNIT, PAIRED, COLUMNS,
        )  # fmt: skip
        column = start + tl.arange(0, COLUMNS)[None, :]
        at = weight_ptr + row.to(tl.int64) * columns + column
        tl.store(at, tile.to(weight_ptr.dtype.element_ty), mask=inside & (column < columns))


@triton.jit
def _write_entries(
    weight_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, columns_ptr, factor,
    first_row, first, last, rows, columns, KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr,
    GROUP: tl.constexpr, MANY_SPANS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    begin = tl.load(starts_ptr + first_row)
    end = tl.load(starts_ptr + tl.minimum(first_row + ROWS, rows))
    for start in range(begin, end, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        mask = entry < end
        column = tl.load(columns_ptr + entry, mask=mask, other=0).to(tl.int32)
        if MANY_SPANS:
            mask = mask & (column >= first) & (column < last)
        row = entry_rows(starts_ptr, first_row, entry, rows, ROWS)
        value = tl.load(values_ptr + entry, mask=mask, other=0.0).to(tl.float32) * factor
        value += _at(base_ptr, scales_ptr, zeros_ptr, row, column, mask, rows, columns, KIND, BITS, ZERO_BITS, GROUP)
        at = weight_ptr + row.to(tl.int64) * columns + column
        tl.store(at, value.to(weight_ptr.dtype.element_ty), mask=mask)
