"""8-bit numbers of codes, looked up in registers: a part of the kernels of weight_fp8_triton.py.

A group has 2^bits numbers. They are rounded to 8 bits once and lie in a register or some, and a code picks its byte there, four
codes in one instruction (PTX: prmt). So a number costs an instruction or two, where making it anew takes seven, two conversions
among them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwha_cli.kernels.bytes_triton import pick
from qwha_cli.kernels.dequantize_triton import gptq_grid, repeat, straddling, word_at

TOGETHER_OF = {2: 16, 3: 8, 4: 8}
"""By bits, the codes that are picked from one number of 32 bits, or 24."""


@triton.jit
def _four(step, low, inverse, FIRST: tl.constexpr):
    """The numbers of four neighbouring codes as four bytes."""
    found = tl.zeros(step.shape, tl.int32)
    for i in tl.static_range(4):
        number = (low + step * (FIRST + i)) * inverse
        found |= number.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * i)
    return found


@triton.jit
def picked(
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
        e0, o0 = pick(a, a, x & 0x3333, ASM), pick(a, a, (x >> 2) & 0x3333, ASM)
        e1, o1 = pick(a, a, (x >> 16) & 0x3333, ASM), pick(a, a, (x >> 18) & 0x3333, ASM)
        first, second = pick(e0, o0, 0x5140, ASM), pick(e0, o0, 0x7362, ASM)
        found = (first, second, pick(e1, o1, 0x5140, ASM), pick(e1, o1, 0x7362, ASM))
    elif BITS == 3:
        b = repeat(_four(step, low, inverse, 4), times)
        word = (start // 32 * 3 + i * 3 // 4)[None, :]
        one = word_at(base_ptr, row, word, stride, inside & (word < words))
        two = word_at(base_ptr, row, word + 1, stride, inside & (word + 1 < words))
        x = straddling(one, two, (i * 24 % 32)[None, :].to(tl.uint32)).to(tl.int32, bitcast=True)
        found = (pick(a, b, _apart(x), ASM), pick(a, b, _apart(x >> 12), ASM))
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
    upper = pick(x & 0, (x & 0) - 1, (x >> 1) & 0x4444, ASM)
    return (pick(a, b, selector, ASM) & ~upper) | (pick(c, d, selector, ASM) & upper)
