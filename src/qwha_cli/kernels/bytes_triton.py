"""Bytes in words of 32 bits, four to a register: picked and turned, for kernels that write 8-bit numbers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(low, high, selector, ASM: tl.constexpr):
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
def quarter_turn(first, second, third, fourth, ASM: tl.constexpr):
    """Four rows of four bytes as four columns: a tuple of the first bytes of all, their second ones, and so on."""
    a, b = pick(first, second, 0x5140, ASM), pick(first, second, 0x7362, ASM)
    c, d = pick(third, fourth, 0x5140, ASM), pick(third, fourth, 0x7362, ASM)
    return pick(a, c, 0x5410, ASM), pick(a, c, 0x7632, ASM), pick(b, d, 0x5410, ASM), pick(b, d, 0x7632, ASM)
