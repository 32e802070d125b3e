"""The transform in Triton: a program reads a few rows once, transforms them in registers and writes them once; see wht.py.

A row of b numbers is seen as (a, t, q), H_b = (A ⊗ S_t ⊗ S_q) / sqrt(b), S Sylvester's matrices; wht_tiles.py says how b is cut.

    1. over q   inside a tile (a, q): by `warp`, products of 16 between a warp's registers (wht_warp_triton.py); by `dot`, X S_q;
                or by `exchange`, butterflies between the lanes of a warp, in float32
    2. over t   butterflies between tiles; both are registers, so this costs an addition a number and nothing else
    3. over a   Aᵀ X on the tensor cores, in chunks of rows and columns so that an a that is no power of two is padded little

Between 2 and 3 the numbers are rounded to the dtype of x, as between the two products of the torch form, and by `warp` once more
between its two; entries of ±1 are exact.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.backend import interpreted
from qwha_cli.kernels.fp8_triton import fitting, scale_of
from qwha_cli.kernels.hadamard import base_matrix, plan
from qwha_cli.kernels.wht_tiles import Tiles
from qwha_cli.kernels.wht_warp_triton import SHRUNK, butterflies, warp_256


def wht(x: Tensor, add: Tensor | None, *, transpose: bool, tiles: Tiles) -> Tensor:
    """As `wht.wht`, for a size, dtype and device that the kernel takes, cut as `tiles` says."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, add, out, None, transpose=transpose, tiles=tiles)
    return out


def wht_fp8(x: Tensor, *, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """X H as e4m3 (rows, n), where a row is one block, and the rows' scales from their norms; see wht_fp8.py."""
    x = x.contiguous()
    rows = x.numel() // tiles.block
    values = torch.empty(rows, tiles.block, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    _launch(x, None, values, scales, transpose=False, tiles=tiles)
    return values, scales


def _launch(x: Tensor, add: Tensor | None, out: Tensor, scales: Tensor | None, *, transpose: bool, tiles: Tiles) -> None:
    rows = x.numel() // tiles.block
    if not rows:
        return
    operand = operand_dtype(x.dtype)
    left, right = matrices(tiles, operand, x.device, transpose)
    # a power of two halfway keeps float16 in range; the others have range enough
    halfway = x.dtype == torch.float16 and tiles.outer > 1
    middle = 2.0 ** -((tiles.tiles * tiles.inner).bit_length() // 2) / shrunk(tiles) if halfway else 1.0
    groups = -(-rows // tiles.rows)
    tensors = (x, x if add is None else add.contiguous(), out, x if scales is None else scales)
    # x may lie on another device than the current one
    with torch.cuda.device_of(x):
        _transform[(min(groups, tiles.programs or groups),)](
            *tensors, left, right, rows, last_factor(tiles) / middle,
            OUTER=tiles.outer, TILES=tiles.tiles, INNER=tiles.inner, CHUNK=tiles.chunk, ROWS=tiles.rows,
            WAY=tiles.way, ADD=add is not None, FP8=scales is not None, MIDDLE=middle,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def shrunk(tiles: Tiles) -> float:
    """What the products over q are multiplied by."""
    return SHRUNK if tiles.way == "warp" else 1.0


def last_factor(tiles: Tiles) -> float:
    """What makes products of matrices of ±1, over q as `tiles` does them, orthonormal."""
    return 1 / (math.sqrt(tiles.block) * shrunk(tiles))


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what the products multiply."""
    # Triton's interpreter, where tests run, multiplies the bit patterns of bfloat16 as integers
    if interpreted():
        return torch.float32
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


@lru_cache(maxsize=128)
def matrices(tiles: Tiles, dtype: torch.dtype, device: torch.device, transpose: bool) -> tuple[Tensor, Tensor]:
    """What multiplies from the left, padded with zeros to whole chunks, and S_q; entries ±1."""
    base = base_matrix(plan(tiles.block).base)
    with torch.inference_mode(False):
        outer = torch.kron(base, base_matrix(tiles.outer // base.shape[0]))
        padded = torch.zeros(tiles.padded, tiles.padded, dtype=dtype)
        # x A has the kernel Aᵀ on the left of the row as a matrix; Sylvester's is symmetric
        padded[: tiles.outer, : tiles.outer] = outer if transpose else outer.mT
        right = base_matrix(tiles.inner if tiles.way == "dot" else 1)
        return padded.to(device), right.to(dtype).to(device)


@triton.jit
def _between(tiles, COUNT: tl.constexpr, HALF: tl.constexpr):
    """S for a tuple of tiles, the steps from HALF on."""
    if HALF < COUNT:
        after = ()
        for t in tl.static_range(COUNT):
            if t & HALF == 0:
                after += (tiles[t] + tiles[t + HALF],)
            else:
                after += (tiles[t - HALF] - tiles[t],)
        tiles = _between(after, COUNT, 2 * HALF)
    return tiles


@triton.jit
def inner(tiles, right, TILES: tl.constexpr, INNER: tl.constexpr, WAY: tl.constexpr):
    """A chunk's tiles transformed over q and t, in float32."""
    done = ()
    for t in tl.static_range(TILES):
        if WAY == "dot":
            done += (tl.dot(tiles[t].to(right.dtype), right),)
        elif WAY == "warp":
            done += (warp_256(tiles[t], right.dtype),)
        else:
            done += (butterflies(tiles[t].to(tl.float32), INNER),)
    return _between(done, TILES, 1)


@triton.jit
def as_operands(
    done, left, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    OUTER: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    """What `inner` made of a chunk, rounded and in the shape in which the product over a reads it."""
    parts = ()
    for t in tl.static_range(TILES):
        if OUTER > 1:
            scaled = done[t] * MIDDLE if MIDDLE != 1 else done[t]
            parts += (tl.reshape(scaled.to(left.dtype), [CHUNK, ROWS * INNER]),)
        else:
            parts += (done[t],)
    return parts


@triton.jit
def outer(
    parts, left, left_ptr, corner, c: tl.constexpr, t: tl.constexpr,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tile t of chunk c of a program's result, float32 (CHUNK · ROWS, INNER), from the operands of all its chunks."""
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    result = parts[c * TILES + t]
    if OUTER > 1:
        result = tl.zeros([CHUNK, ROWS * INNER], tl.float32)
        for k in tl.static_range(chunks):
            piece = left if chunks == 1 else tl.load(left_ptr + (c * chunks * CHUNK + k) * CHUNK + corner)
            result = tl.dot(piece, parts[k * TILES + t], result)
        result = tl.reshape(result, [CHUNK * ROWS, INNER])
    return result


@triton.jit
def as_read(result, CHUNK: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr):
    """What `outer` gives where other tensors are still read: it moves to their layout, once, and not each of them to its."""
    if ROWS == 1:
        # a sum of one, after which the compiler no longer prefers the product's layout
        result = tl.sum(tl.reshape(result, [CHUNK, 1, INNER]), axis=1)
    return result


@triton.jit
def over_rows(sums, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Sums over q, (CHUNK · ROWS,) in the order (a, row), summed over a too: (ROWS,)."""
    return tl.sum(tl.reshape(sums, [CHUNK, ROWS]), axis=0)


@triton.jit
def along_rows(numbers, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """One number a row, (ROWS,), for the rows of a tile: (CHUNK · ROWS, 1)."""
    return tl.reshape(tl.broadcast_to(numbers[None, :], [CHUNK, ROWS]), [CHUNK * ROWS])[:, None]


@triton.jit
def written_scales(bound, scale_ptr, group, rows, ROWS: tl.constexpr):
    """Write the 8-bit scales of a group's rows, whose numbers are `bound` (ROWS,) at most; one over each."""
    scale, inverse = scale_of(bound)
    which = group * ROWS + tl.arange(0, ROWS)
    tl.store(scale_ptr + which, scale, mask=which < rows)
    return inverse


@triton.jit
def frame(
    left_ptr, right_ptr,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    """What all groups of rows have alike: a and row of a tile's rows, columns in a chunk, places in A, A's first piece, S_q."""
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    # the rows of a tile are (a, row): so the reshape before the product over a moves nothing
    a = tl.arange(0, CHUNK * ROWS) // ROWS
    row = tl.arange(0, CHUNK * ROWS) % ROWS
    q = tl.arange(0, INNER)
    column = (a * (TILES * INNER))[:, None] + q[None, :]
    corner = tl.arange(0, CHUNK)[:, None] * (chunks * CHUNK) + tl.arange(0, CHUNK)[None, :]
    left = tl.load(left_ptr + corner)
    right = tl.load(right_ptr + q[:, None] * INNER + q[None, :]) if WAY == "dot" else left
    return a, row, column, corner, left, right


# a single row, or sixteen, is no reason to compile again
@triton.jit(do_not_specialize=["rows"])
def _transform(
    x_ptr, add_ptr, out_ptr, scale_ptr, left_ptr, right_ptr, rows, last,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    WAY: tl.constexpr, ADD: tl.constexpr, FP8: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    a, row, column, corner, left, right = frame(left_ptr, right_ptr, OUTER, TILES, INNER, CHUNK, ROWS, WAY)
    place = (row * block)[:, None] + column
    # large inputs have more numbers than 32 bits count
    stride = tl.full((), ROWS * block, tl.int64)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        start = group * stride
        inside = row < rows - group * ROWS
        squares = tl.zeros([CHUNK * ROWS], tl.float32)
        parts = ()
        for c in tl.static_range(chunks):
            at = start + c * (CHUNK * TILES * INNER) + place
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            tiles = ()
            for t in tl.static_range(TILES):
                tile = tl.load(x_ptr + at + t * INNER, mask=mask, other=0.0)
                tiles += (tile,)
                if FP8:
                    squares += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), axis=1)
            parts += as_operands(inner(tiles, right, TILES, INNER, WAY), left, TILES, INNER, CHUNK, ROWS, OUTER, MIDDLE)
        factor = last
        if FP8:
            inverse = written_scales(tl.sqrt(over_rows(squares, CHUNK, ROWS)), scale_ptr, group, rows, ROWS)
            factor = along_rows(inverse, CHUNK, ROWS) * last
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            for t in tl.static_range(TILES):
                result = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * factor
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                if ADD:
                    result += tl.load(add_ptr + at, mask=mask, other=0.0).to(tl.float32)
                if FP8:
                    result = fitting(result)
                    # eight a lane as of the 16-bit numbers that were read, not sixteen: all tensors have one layout
                    at = tl.max_contiguous(at, [1, 8])
                tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)
