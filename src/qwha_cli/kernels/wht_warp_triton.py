"""Rows of 256 numbers transformed inside a warp, between registers: a part of the kernels of wht_triton.py.

A warp's 32 lanes with 8 numbers each hold a row, the 8 bits of a number's index spread over lane and register. S_256 is a product
over those bits, so it does not matter which bit lies where, and S_256 = S_16 ⊗ S_16 are two products on the tensor cores (PTX:
mma.m16n8k16) with the row as their right side. The first sums over two bits of the lane and two of the register, and its result
lies so that the second sums over the other four and hands every number back to where it came from. Nothing passes through shared
memory or from lane to lane, as butterflies would.

The layout that this needs is the one in which Triton loads 256 neighbours: 8 of them a lane, in one piece or in several. That the
compiler keeps to it is tested (tests/kernels/test_wht_warp.py), and why it does is said below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwha_cli.kernels.backend import interpreted

SHRUNK = 1 / 16
"""What S_256 is multiplied by on the way: each S_16 has entries of ±1/4, so float16 stays in range."""

# the interpreter, where tests run, knows no instructions of a card
_ASM = tl.constexpr(not interpreted())
_SHRUNK = tl.constexpr(SHRUNK)


def _instructions(dtype: str, quarter: str, sign: str) -> str:
    # $0 to $7 are the results, $8 to $11 the eight numbers in pairs. Lane l has in a product's left side row l / 4, and columns
    # 2 (l mod 4) and the next: S_8 there, whose signs are the parities of the bits that row and column share; S_16 is S_8 thrice
    # and −S_8
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    left, none = "{h, h, h, n}", "{z, z, z, z}"
    pairs = "\n".join(f"cvt.rn.{dtype}x2.f32 s{i}, d{2 * i + 1}, d{2 * i};" for i in range(4))
    return f"""{{
        .reg .b32 l, p, q, h, n, s<4>;
        .reg .f32 z, d<8>;
        mov.u32 l, %laneid;
        shr.u32 p, l, 3;
        and.b32 p, p, l;
        and.b32 p, p, 3;
        shr.u32 q, p, 1;
        xor.b32 p, p, q;
        and.b32 p, p, 1;
        shr.u32 q, l, 2;
        xor.b32 q, q, p;
        shl.b32 p, p, 15;
        shl.b32 q, q, 31;
        or.b32 h, p, q;
        xor.b32 h, h, {quarter};
        xor.b32 n, h, {sign};
        mov.f32 z, 0f00000000;
        {product} {{d0, d1, d2, d3}}, {left}, {{$8, $9}}, {none};
        {product} {{d4, d5, d6, d7}}, {left}, {{$10, $11}}, {none};
        {pairs}
        {product} {{$0, $1, $4, $5}}, {left}, {{s0, s2}}, {none};
        {product} {{$2, $3, $6, $7}}, {left}, {{s1, s3}}, {none};
    }}"""


_BF16 = tl.constexpr(_instructions("bf16", "0x3E803E80", "0x80008000"))
_F16 = tl.constexpr(_instructions("f16", "0x34003400", "0x80008000"))
_REGISTERS = tl.constexpr(",".join(["=f"] * 8 + ["r"] * 4))


@triton.jit
def warp_256(tile, dtype: tl.constexpr):
    """A tile (rows, 256), rounded to `dtype`, bfloat16 or float16, times S_256 / 16, float32; rounded again halfway."""
    if _ASM:
        rounded = tile.to(dtype)
        asm: tl.constexpr = _BF16 if dtype == tl.bfloat16 else _F16
        # not pure, so the compiler does not move it behind a change of layout, where lanes would hold other numbers
        found = tl.inline_asm_elementwise(asm, _REGISTERS, [rounded], dtype=tl.float32, is_pure=False, pack=8)
    else:
        found = butterflies(tile.to(tl.float32), 256) * _SHRUNK
    return found


@triton.jit
def butterflies(tile, SIZE: tl.constexpr):
    """A tile times Sylvester's S, in butterflies along the rows of the tile."""
    total: tl.constexpr = tile.shape[0] * tile.shape[1]
    shape: tl.constexpr = tile.shape
    half: tl.constexpr = SIZE // 2
    if half > 0:
        tile = butterflies(tile, half) if half > 1 else tile
        pairs = tl.reshape(tile, [total // SIZE, 2, half])
        # the sum over a pair is a shuffle, with no change of layout; sum − 2b is a − b
        both = tl.sum(pairs, axis=1, keep_dims=True)
        second = tl.arange(0, 2)[None, :, None] == 1
        tile = tl.reshape(tl.where(second, both - 2 * pairs, both), shape)
    return tile
