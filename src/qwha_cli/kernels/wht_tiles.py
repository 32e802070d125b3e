"""How the Triton kernel of the transform cuts a row, and which sizes it takes.

A block of b numbers is seen as (a, t, q), H_b = (A ⊗ S_t ⊗ S_q) / sqrt(b): A = base ⊗ S is multiplied on the tensor cores, S_t is
done in additions between registers, and q, contiguous in memory, inside a tile. The cut is a function of the size alone and
is measured beforehand (benchmarks/bench_wht.py), never at run time: equal inputs give equal bits on equal cards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from qwha_cli.kernels.hadamard import plan

# a row stays in registers between its load and its store; numbers with their padding
_LARGEST_PROGRAM = 32768
# above it, products with 64 rows of A at once need more registers than there are
_LARGEST_WIDE_PROGRAM = 16384
_SMALLEST_PROGRAM = 4096
_LARGEST_OUTER = 256
# a product on the tensor cores sums at least 16 numbers
_SMALLEST_PRODUCT = 16
# what `warp` transforms at once, and how often a warp's registers hold it
_LOG2_WARP = 8
_LOG2_WARP_TILES = 3
# above it, a program with numbers in warps' registers takes eight warps
_LARGEST_NARROW_PROGRAM = 12288
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tiles:
    """A cut of a block of outer · tiles · inner numbers.

    Attributes:
        outer: a, the order of the matrix A; 1 for none.
        tiles: t, a power of two.
        inner: q, a power of two.
        chunk: Rows and columns of A that are multiplied at once, a power of two; a is padded to a multiple.
        way: How S_q is done: by products of whole matrices on the tensor cores, of a warp's own registers (q = 256), or by
            butterflies between the lanes of a warp.
        rows: Rows of x that a program holds at once, a power of two.
        warps: Warps of a program.
        programs: Programs on the whole device, each taking one group of rows after another; None for one group each.
        stages: Groups of rows that are on their way at once where a program takes several.
    """

    outer: int
    tiles: int
    inner: int
    chunk: int
    way: Literal["dot", "warp", "exchange"] = "dot"
    rows: int = 1
    warps: int = 4
    programs: int | None = None
    stages: int = 1

    @property
    def block(self) -> int:
        """Numbers of one Hadamard block."""
        return self.outer * self.tiles * self.inner

    @property
    def padded(self) -> int:
        """The outer order with its padding."""
        return -(-self.outer // self.chunk) * self.chunk

    @property
    def held(self) -> int:
        """Numbers that a program holds at once, padding among them."""
        return self.padded * self.tiles * self.inner * self.rows


# sizes of models at which another cut than the rule's was faster (an H200; bench_wht.py tune; docs/results/speed.md)
_MEASURED = {
    4096: Tiles(16, 1, 256, 16, "warp"),
    8192: Tiles(32, 1, 256, 32, "warp", warps=8),
    11008: Tiles(172, 1, 64, 32),
    18432: Tiles(72, 1, 256, 16, "warp", warps=8),
    18944: Tiles(148, 1, 128, 32, warps=8),
    27648: Tiles(108, 1, 256, 128, "warp", warps=16),
}

FusedOp = Literal["transform", "norm", "norm of a sum", "norm, backward", "gate", "gate, backward"]
# what is done in the transform's pass besides: programs read several tensors, or write two (an H200; bench_fused_wht.py tune)
_MEASURED_FUSED: dict[tuple[FusedOp, int], Tiles] = {
    ("norm of a sum", 2048): Tiles(8, 1, 256, 16, "warp"),
    ("norm, backward", 2048): Tiles(8, 1, 256, 16, "warp"),
    ("norm, backward", 3072): Tiles(12, 1, 256, 16, "warp", rows=2),
    ("gate", 4864): Tiles(76, 1, 64, 128, warps=8, programs=528),
    ("gate", 8192): Tiles(32, 1, 256, 32, "warp", warps=8, programs=528),
    ("gate", 9728): Tiles(76, 2, 64, 128),
    ("gate", 14336): Tiles(28, 2, 256, 32, "warp"),
    ("gate, backward", 4864): Tiles(76, 1, 64, 128, rows=2, warps=8),
    ("gate, backward", 8192): Tiles(16, 2, 256, 16, "warp"),
    ("gate, backward", 9728): Tiles(76, 2, 64, 128),
    ("gate, backward", 14336): Tiles(56, 1, 256, 64, "warp", warps=8),
}
# of 8-bit numbers, whose scale takes a sum over the row first (an H200; bench_fused_wht.py tune --ops "8 bits")
_MEASURED_FP8: dict[tuple[FusedOp, int], Tiles] = {
    ("norm of a sum", 2048): Tiles(8, 1, 256, 16, "warp"),
    ("norm, backward", 2048): Tiles(8, 1, 256, 16, "warp"),
    ("gate", 4864): Tiles(76, 1, 64, 128, rows=2),
    ("gate", 9728): Tiles(76, 2, 64, 128),
    ("gate", 14336): Tiles(56, 1, 256, 64, "warp", warps=8),
}


@lru_cache(maxsize=1024)
def unfit(size: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel does not take rows of this size and dtype; None if it does.

    It takes bfloat16 and float16 whose Hadamard block has a base of at most 256 and fits, padded, into the registers of a
    program: 32,768 numbers. Float32 is left to torch, because the tensor cores cut sums off rather than round them; only merging
    and calibration ask for it.

    Raises:
        KernelError: size < 1.
    """
    chosen = plan(size)
    if dtype not in _DTYPES:
        return f"the Triton kernel of wht computes no {dtype}"
    if chosen.block == 1:
        return f"the transform of rows of {size} changes nothing"
    if chosen.base > _LARGEST_OUTER:
        return f"rows of {size} have a base of order {chosen.base}, the Triton kernel of wht takes up to {_LARGEST_OUTER}"
    held = tiles_for(size).held
    if held > _LARGEST_PROGRAM:
        limit = f"a program of the Triton kernel of wht has {_LARGEST_PROGRAM}"
        return f"rows of {size} take {held} registers with their padding, {limit}"
    return None


@lru_cache(maxsize=1024)
def tiles_for(size: int) -> Tiles:
    """The cut of a size that is not `unfit`."""
    if size in _MEASURED:
        return _MEASURED[size]
    chosen = plan(size)
    if chosen.log2 >= _LOG2_WARP:
        return _warp_cut(chosen.base, chosen.log2)
    wide = _cut(chosen.base, chosen.log2, 64)
    return wide if wide.held <= _LARGEST_WIDE_PROGRAM else _cut(chosen.base, chosen.log2, 32)


def fused_tiles_for(op: FusedOp, size: int, *, fp8: bool = False) -> Tiles:
    """The cut of a transform that does more in its pass than transform, or reads or writes 8-bit numbers: see fused_wht.py."""
    measured = _MEASURED_FP8 if fp8 else _MEASURED_FUSED
    return measured.get((op, size)) or tiles_for(size)


def gate_pays(size: int) -> bool:
    """Whether a gated activation of this many numbers is faster in the transform's pass than apart.

    It is not where a row takes several products with A: they need the registers that its other two tensors have to lie in.
    """
    if unfit(size, torch.bfloat16) is not None:
        return False
    return ("gate", size) in _MEASURED_FUSED or tiles_for(size).padded == tiles_for(size).chunk


def _warp_cut(base: int, log2: int) -> Tiles:
    """256 numbers inside a warp, two tiles where there are as many, the rest on the tensor cores with the least padding.

    Where a warp's registers hold a whole row, and A would be small, tiles take all of the rest: nothing is exchanged at all.
    """
    left = log2 - _LOG2_WARP
    if base == 1 and left <= _LOG2_WARP_TILES:
        rows = max(1, 4 >> left)
        return Tiles(1, 2**left, 2**_LOG2_WARP, 1, "warp", rows, warps=rows)
    tiles = min(left, 1)
    outer = base * 2 ** (left - tiles)
    # of those that pad the least the largest, which is the fewest products
    chunk = min((16, 32, 64, 128), key=lambda chunk: (-(-outer // chunk) * chunk, -chunk))
    held = -(-outer // chunk) * chunk * 2 ** (tiles + _LOG2_WARP)
    return Tiles(outer, 2**tiles, 2**_LOG2_WARP, chunk, "warp", warps=4 if held <= _LARGEST_NARROW_PROGRAM else 8)


def _cut(base: int, log2: int, largest_outer: int) -> Tiles:
    """64 numbers inside where there are as many, an outer order up to the largest, tiles for what is left."""
    inner = min(6, log2)
    if base == 1:
        # shorter rows are balanced, so that both products have enough to sum
        inner = min(inner, log2 if log2 < 8 else -(-log2 // 2))
        outer = 1 if log2 < 8 else min(largest_outer, 2 ** (log2 - inner))
    else:
        outer = base
        while outer * 2 <= largest_outer and outer < base * 2 ** (log2 - inner):
            outer *= 2
    tiles = base * 2 ** (log2 - inner) // outer
    chunk = _chunk(outer, largest_outer)
    held = -(-outer // chunk) * chunk * tiles * 2**inner
    # a power of two, as everything in Triton is
    rows = 2 ** max(0, (_SMALLEST_PROGRAM // held).bit_length() - 1)
    way = "dot" if 2**inner >= _SMALLEST_PRODUCT else "exchange"
    return Tiles(outer, tiles, 2**inner, chunk, way, rows, warps=4 if held * rows <= 8192 else 8)


def _chunk(outer: int, largest: int) -> int:
    """64, which the faster product of a Hopper card needs, if it is one chunk padded by a third at most; else what pads least."""
    if outer == 1:
        return 1
    if largest == 64 and 48 <= outer <= 64:
        return 64
    # larger chunks are fewer products, in number with the square: worth a tenth more padding, and for many of them more
    return 32 if outer > 80 or -(-outer // 32) * 32 * 10 <= -(-outer // 16) * 16 * 11 else 16
