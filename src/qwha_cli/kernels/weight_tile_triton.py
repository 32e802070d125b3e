"""A weight in 16 bits from codes and entries of F, which meet in shared memory; what dequantize_triton.py does in general.

A program takes some rows and a span of their columns. It lays the entries out in a tile of float32 in shared memory, where
nothing else is; then each thread reads the tile for eight neighbours, adds their base and writes 16 bytes. Written over the base,
as dequantize_triton.py does, each entry of two bytes keeps the cache as busy as 32 bytes do: a quarter of the time.

The base takes three instructions a number instead of eleven. A code c that lies at bit p of a float32's mantissa, below the
exponent of 2^k, k = 23 − p, is the number 2^k + c. So s c − s z = s (2^k + c) − s (2^k + z), in which p is chosen so that the
last product is exact: k + 1 bits of 2^k + z, those of its fraction, and the 11 of s, are 24 together at most.

Triton has no scattered writes to shared memory, so the tile is PTX; the interpreter, which has none, writes entries afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.backend import interpreted
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize_triton import (
    add_entries,
    entries_of,
    gptq_grid,
    lists_of,
    operands,
    span_of,
    straddling,
    word_at,
)
from qwha_cli.kernels.places import Places

# the tile has so many numbers of four bytes, and a thread eight neighbours at a time
_ROWS, _COLUMNS, _WARPS = 4, 1024, 4
# by bits of a code, where one program more fits so
_REGISTERS = {3: 56}
_CELL = 8
# by bits of a code, the lowest bit that it lies at
_FIRST = {2: 16, 3: 14, 4: 15}
# of a float16 scale, the leading one among them
_SCALE_BITS = 11

_TILE = tl.constexpr("{ .shared .align 128 .b8 qwha_tile[16384]; mov.u32 $0, qwha_tile; }")
_TABLE = tl.constexpr("{ .shared .align 64 .b8 qwha_table[64]; mov.u32 $0, qwha_table; }")
_CLEAR = tl.constexpr("""{
    .reg .b32 z;
    mov.b32 z, 0;
    st.shared.v4.b32 [$1], {z, z, z, z};
    st.shared.v4.b32 [$2], {z, z, z, z};
    mov.b32 $0, z;
}""")
_LAY = tl.constexpr("""{
    .reg .pred p;
    setp.ne.s32 p, $3, 0;
    @p st.shared.f32 [$1], $2;
    mov.b32 $0, 0;
}""")
_READ = tl.constexpr("""{
    ld.shared.v4.f32 {$0, $1, $2, $3}, [$8];
    ld.shared.v4.f32 {$4, $5, $6, $7}, [$9];
}""")


def _write_eight(dtype: str) -> str:
    pairs = "\n".join(f"cvt.rn.{dtype}x2.f32 w{i}, ${2 * i + 3}, ${2 * i + 2};" for i in range(4))
    return f"""{{
        .reg .b32 w<4>;
        .reg .pred p;
        {pairs}
        setp.ne.s32 p, $10, 0;
        @p st.global.v4.b32 [$1], {{w0, w1, w2, w3}};
        mov.b32 $0, 0;
    }}"""


_LOOK_UP = tl.constexpr("ld.shared.f32 $0, [$1];")
# Triton's own loads have threads lie as memory does, for some of these tensors along the rows, and the numbers change hands
_LOAD = tl.constexpr("""{
    .reg .pred p;
    setp.ne.s32 p, $2, 0;
    mov.b32 $0, 0;
    @p ld.global.nc.b32 $0, [$1];
}""")
_WRITE_BF16, _WRITE_F16 = tl.constexpr(_write_eight("bf16")), tl.constexpr(_write_eight("f16"))


def takes(base: Codes | Tensor | None, dtype: torch.dtype, columns: int) -> bool:
    """Whether a weight (out, columns) of this base, or of zeros, and dtype is made here."""
    if isinstance(base, Tensor) or dtype not in (torch.bfloat16, torch.float16) or columns % _CELL:
        return False
    if base is None:
        return True
    if base.group_size % _CELL:
        return False
    # k + 1 bits, a fraction's and a scale's are 24 at most, k being 23 less the first bit
    return base.layout == "nf4" or base.zero_bits - base.bits <= _FIRST.get(base.bits, 0) - _SCALE_BITS


def launch(weight: Tensor, base: Codes | None, entries: tuple[Tensor, Places, float] | None) -> None:
    """Write a weight that this module `takes`.

    Args:
        weight: (out, in), bfloat16 or float16, contiguous, written as a whole.
        base: (out, in); None for zeros.
        entries: Values (nnz,) of F, their places and the factor on them, to be added; None for none.
    """
    rows, columns = weight.shape
    grid = (-(-rows // _ROWS), -(-columns // _COLUMNS))
    lists, slots = lists_of(entries, weight, _COLUMNS, rows * grid[1])
    (codes, *others), strides, kind = operands(base, weight)
    # the codes of eight numbers are whole words
    codes = codes.view(-1).view(torch.int32) if kind["KIND"] == "nf4" else codes
    _weight[grid](
        weight, codes, *others, *lists, rows, columns, *strides,
        **kind, FIRST=_FIRST.get(kind["BITS"], 0), SPARSE=entries is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, SLOTS=slots,
        ASM=not interpreted(), num_warps=_WARPS, maxnreg=_REGISTERS.get(kind["BITS"]),
        enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _exactly(word, scale, shift, P: tl.constexpr, MASK: tl.constexpr):
    """Scale · code + shift for a code at bit P of words; see above."""
    high: tl.constexpr = 1 << (23 - P)
    lifted = ((word & (MASK << P)) | ((127 + 23 - P) << 23)).to(tl.float32, bitcast=True)
    return tl.fma(lifted, scale, tl.fma(scale, -high, shift))


@triton.jit
def _moved(word, UP: tl.constexpr):
    return word << UP if UP >= 0 else word >> -UP


@triton.jit
def _gptq_words(
    base_ptr, scales_ptr, zeros_ptr, row, cell, known, rows, columns, stride, zero_stride,
    BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The codes of cells, the first in the lowest bits, their scales, and minus scale times zero."""
    bit = cell * (8 * BITS)
    word = word_at(base_ptr, row, bit // 32, stride, known)
    shift = (bit % 32).to(tl.uint32)
    if BITS == 2:
        word = word >> shift
    elif BITS == 3:
        more = known & (bit // 32 + 1 < (columns * BITS + 31) // 32)
        word = straddling(word, word_at(base_ptr, row, bit // 32 + 1, stride, more), shift)
    scale, offset = gptq_grid(scales_ptr, zeros_ptr, row, cell * 8 // GROUP, known, rows, stride, zero_stride, BITS, ZERO_BITS)
    return word, scale, offset


@triton.jit
def _of_gptq(word, scale, offset, BITS: tl.constexpr, FIRST: tl.constexpr):
    """The eight numbers of cells, a tuple of float32."""
    found = ()
    # as many neighbours at once as have room between that bit and the exponent
    together: tl.constexpr = (23 - FIRST) // BITS
    for j in tl.static_range(8):
        moved = _moved(word, FIRST - j // together * together * BITS)
        found += (_exactly(moved, scale, offset, FIRST + j % together * BITS, (1 << BITS) - 1),)
    return found


@triton.jit
def _of_nf4(word, scale, table_ptr, table, ASM: tl.constexpr):
    """The eight numbers of cells, a tuple of float32, from a table in shared memory at `table`, or at `table_ptr`."""
    found = ()
    for j in tl.static_range(8):
        # two a byte, the first in the high half
        code = (word >> (j // 2 * 8 + 4 - j % 2 * 4)) & 15
        if ASM:
            number = tl.inline_asm_elementwise(_LOOK_UP, "=f,r", [table + 4 * code], dtype=tl.float32, is_pure=False, pack=1)
        else:
            number = tl.load(table_ptr + code)
        found += (number * scale,)
    return found


@triton.jit
def _loaded(places, known, ASM: tl.constexpr):
    """Words of 32 bits, zero where they are not known."""
    if ASM:
        arguments = [places.to(tl.int64), known.to(tl.int32)]
        word = tl.inline_asm_elementwise(_LOAD, "=&r,l,r", arguments, dtype=tl.int32, is_pure=True, pack=1)
        found = word.to(places.dtype.element_ty, bitcast=True)
    else:
        found = tl.load(places, mask=known, other=0)
    return found


@triton.jit
def _laid(places, numbers, mask):
    """Write float32 to places in shared memory."""
    arguments = [places, numbers, mask.to(tl.int32)]
    tl.inline_asm_elementwise(_LAY, "=r,r,f,r", arguments, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _weight(
    weight_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, columns_ptr, factor, rows, columns, stride, zero_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr,
    SPARSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    inner = tl.arange(0, ROWS)[:, None]
    row = tl.program_id(0) * ROWS + inner
    inside = row < rows
    start = tl.program_id(1) * COLUMNS
    local = tl.arange(0, COLUMNS // 8)[None, :]
    cell = start // 8 + local
    known = inside & (cell < columns // 8)
    if SPARSE:
        begin, end = span_of(starts_ptr, row, inside)
    # what is read is under way before anything waits
    table = 0
    if KIND == "zeros":
        word, scale, offset = known, known, known
    elif KIND == "gptq":
        word, scale, offset = _gptq_words(
            base_ptr, scales_ptr, zeros_ptr, row, cell, known, rows, columns, stride, zero_stride, BITS, ZERO_BITS, GROUP
        )
    else:
        wide = row.to(tl.int64)
        word = _loaded(base_ptr + (wide * (columns // 8) + cell), known, ASM)
        scale = _loaded(scales_ptr + (wide * (columns // GROUP) + cell * 8 // GROUP), known, ASM)
        if ASM:
            code = tl.arange(0, 16)
            table = tl.inline_asm_elementwise(_TABLE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
            _laid(table + 4 * code, tl.load(zeros_ptr + code), code >= 0)
    if SPARSE and ASM:
        tile = tl.inline_asm_elementwise(_TILE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        # halves of every second four cells change places, so that eight lanes read from all banks
        one = tile + ((inner * (4 * COLUMNS) + local * 32) ^ (((local >> 2) & 1) << 4))
        two = one ^ 16
        tl.inline_asm_elementwise(_CLEAR, "=r,r,r", [one, two], dtype=tl.int32, is_pure=False, pack=1)
    if SPARSE:
        mask, column, value = entries_of(values_ptr, columns_ptr, begin, end, 0, factor, SLOTS)
    if SPARSE or KIND == "nf4":
        tl.debug_barrier()
    if SPARSE and ASM:
        for first in range(0, tl.max(end - begin), SLOTS):
            at = column - start
            _laid(tile + ((inner * (4 * COLUMNS) + at * 4) ^ (((at >> 5) & 1) << 4)), value, mask)
            mask, column, value = entries_of(values_ptr, columns_ptr, begin, end, first + SLOTS, factor, SLOTS)
        tl.debug_barrier()
    if KIND == "zeros":
        nothing = tl.zeros(known.shape, tl.float32)
        numbers = (nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing)
    elif KIND == "gptq":
        numbers = _of_gptq(word, scale, offset, BITS, FIRST)
    else:
        numbers = _of_nf4(word, scale, zeros_ptr, table, ASM)
    if SPARSE and ASM:
        added = tl.inline_asm_elementwise(
            _READ, "=f,=f,=f,=f,=f,=f,=f,=f,r,r", [one, two],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip
        sums = ()
        for j in tl.static_range(8):
            sums += (numbers[j] + added[j],)
        numbers = sums
    weight_at = weight_ptr + (row.to(tl.int64) * columns + cell * 8)
    if ASM:
        asm: tl.constexpr = _WRITE_BF16 if weight_ptr.dtype.element_ty == tl.bfloat16 else _WRITE_F16
        arguments = [
            weight_at.to(tl.int64), numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6],
            numbers[7], known.to(tl.int32),
        ]  # fmt: skip
        tl.inline_asm_elementwise(asm, "=r,l,f,f,f,f,f,f,f,f,r", arguments, dtype=tl.int32, is_pure=False, pack=1)
    else:
        for j in tl.static_range(8):
            tl.store(weight_at + j, numbers[j].to(weight_ptr.dtype.element_ty), mask=known)
        if SPARSE:
            bytes_ptr = base_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) if KIND == "nf4" else base_ptr
            add_entries(
                weight_ptr, bytes_ptr, scales_ptr, zeros_ptr, values_ptr, columns_ptr, begin, end, mask, column, value, factor,
                1.0, row, rows, columns, stride, zero_stride, columns, 1, KIND, BITS, ZERO_BITS, GROUP, SLOTS,
            )  # fmt: skip
