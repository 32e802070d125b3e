"""Norms and gated activations in the transform's own pass, in Triton; see fused_wht.py and wht_triton.py.

A program's tiles are those of the transform. A row's sums are taken while its tiles are read, over q in a tile, then over a; what
is constant along a row, the norm, is multiplied after the transform, which is linear.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.wht_tiles import Tiles, fused_tiles_for
from qwha_cli.kernels.wht_triton import as_operands, inner, matrices, operand_dtype, outer


def norm_forward(
    x: Tensor, add: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z, h as in `fused_wht.norm_wht`, and 1 / rms(h) of every row, float32."""
    x = x.contiguous()
    tiles = tiles or fused_tiles_for("norm" if add is None else "norm of a sum", x.shape[-1])
    rows = x.numel() // tiles.block
    z = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = x if add is None else torch.empty_like(x)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        left, right = matrices(tiles, operand_dtype(dtype), x.device, False)
        with torch.cuda.device_of(x):
            _norm_forward[_grid(tiles, rows)](
                x, x if add is None else add.contiguous(), weight.contiguous(), h, z, scales, left, right, rows, eps,
                1 / math.sqrt(tiles.block), ADD=add is not None, **_cut(tiles),
            )  # fmt: skip
    return z, h, scales


def norm_backward(
    dz: Tensor, z: Tensor, h: Tensor, weight: Tensor, scales: Tensor, dh: Tensor | None, *, tiles: Tiles | None = None
) -> Tensor:
    """The gradient of h, of its dtype, with `dh` added, from that of z."""
    h, dz = h.contiguous(), dz.contiguous()
    tiles = tiles or fused_tiles_for("norm, backward", h.shape[-1])
    rows = h.numel() // tiles.block
    total = torch.empty_like(h)
    if rows:
        left, right = matrices(tiles, operand_dtype(z.dtype), h.device, True)
        with torch.cuda.device_of(h):
            _norm_backward[_grid(tiles, rows)](
                dz, z, h, weight.contiguous(), scales, h if dh is None else dh.contiguous(), total, left, right, rows,
                1 / math.sqrt(tiles.block), MORE=dh is not None, **_cut(tiles),
            )  # fmt: skip
    return total


def gate_forward(gate: Tensor, up: Tensor, *, dtype: torch.dtype, tiles: Tiles | None = None) -> Tensor:
    """As `fused_wht.gate_wht`."""
    gate, up = gate.contiguous(), up.contiguous()
    tiles = tiles or fused_tiles_for("gate", gate.shape[-1])
    rows = gate.numel() // tiles.block
    z = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    if rows:
        left, right = matrices(tiles, operand_dtype(dtype), gate.device, False)
        with torch.cuda.device_of(gate):
            _gate_forward[_grid(tiles, rows)](
                gate, up, z, left, right, rows, 1 / math.sqrt(tiles.block), **_cut(tiles)
            )  # fmt: skip
    return z


def gate_backward(dz: Tensor, gate: Tensor, up: Tensor, *, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of both inputs, where contiguous ones lay."""
    gate, up, dz = gate.contiguous(), up.contiguous(), dz.contiguous()
    tiles = tiles or fused_tiles_for("gate, backward", gate.shape[-1])
    rows = gate.numel() // tiles.block
    if rows:
        left, right = matrices(tiles, operand_dtype(dz.dtype), gate.device, True)
        with torch.cuda.device_of(gate):
            _gate_backward[_grid(tiles, rows)](dz, gate, up, left, right, rows, 1 / math.sqrt(tiles.block), **_cut(tiles))
    return gate, up


def _grid(tiles: Tiles, rows: int) -> tuple[int]:
    groups = -(-rows // tiles.rows)
    return (min(groups, tiles.programs or groups),)


def _cut(tiles: Tiles) -> dict[str, int | bool]:
    return {
        "OUTER": tiles.outer, "TILES": tiles.tiles, "INNER": tiles.inner, "CHUNK": tiles.chunk, "ROWS": tiles.rows,
        "DOT": tiles.way == "dot", "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


@triton.jit
def _over_rows(sums, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Sums over q, (CHUNK · ROWS,) in the order (a, row), summed over a too: (ROWS,)."""
    return tl.sum(tl.reshape(sums, [CHUNK, ROWS]), axis=0)


@triton.jit
def _along_rows(numbers, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """One number a row, (ROWS,), for the rows of a tile: (CHUNK · ROWS, 1)."""
    return tl.reshape(tl.broadcast_to(numbers[None, :], [CHUNK, ROWS]), [CHUNK * ROWS])[:, None]


@triton.jit(do_not_specialize=["rows"])
def _norm_forward(
    x_ptr, add_ptr, weight_ptr, sum_ptr, out_ptr, scale_ptr, left_ptr, right_ptr, rows, eps, last, ADD: tl.constexpr,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    a = tl.arange(0, CHUNK * ROWS) // ROWS
    row = tl.arange(0, CHUNK * ROWS) % ROWS
    q = tl.arange(0, INNER)
    column = (a * (TILES * INNER))[:, None] + q[None, :]
    corner = tl.arange(0, CHUNK)[:, None] * (chunks * CHUNK) + tl.arange(0, CHUNK)[None, :]
    left = tl.load(left_ptr + corner)
    right = tl.load(right_ptr + q[:, None] * INNER + q[None, :]) if DOT else left
    stride = tl.full((), ROWS * block, tl.int64)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        start = group * stride
        inside = row < rows - group * ROWS
        squares = tl.zeros([CHUNK * ROWS], tl.float32)
        parts = ()
        for c in tl.static_range(chunks):
            real = a < OUTER - c * CHUNK
            tiles = ()
            for t in tl.static_range(TILES):
                at = c * (CHUNK * TILES * INNER) + t * INNER + column
                place = start + (row * block)[:, None] + at
                mask = (inside & real)[:, None]
                tile = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
                if ADD:
                    tile += tl.load(add_ptr + place, mask=mask, other=0.0).to(tl.float32)
                    rounded = tile.to(sum_ptr.dtype.element_ty)
                    tl.store(sum_ptr + place, rounded, mask=mask)
                    tile = rounded.to(tl.float32)
                squares += tl.sum(tile * tile, axis=1)
                tiles += (tile * tl.load(weight_ptr + at, mask=real[:, None], other=0.0).to(tl.float32),)
            parts += as_operands(inner(tiles, right, TILES, INNER, DOT), left, TILES, INNER, CHUNK, ROWS, OUTER, 1)
        scale = tl.rsqrt(_over_rows(squares, CHUNK, ROWS) / block + eps)
        which = group * ROWS + tl.arange(0, ROWS)
        tl.store(scale_ptr + which, scale, mask=which < rows)
        factor = _along_rows(scale, CHUNK, ROWS) * last
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            for t in tl.static_range(TILES):
                result = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * factor
                place = start + (row * block)[:, None] + (c * (CHUNK * TILES * INNER) + t * INNER + column)
                tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    grad_ptr, z_ptr, h_ptr, weight_ptr, scale_ptr, more_ptr, out_ptr, left_ptr, right_ptr, rows, last, MORE: tl.constexpr,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    a = tl.arange(0, CHUNK * ROWS) // ROWS
    row = tl.arange(0, CHUNK * ROWS) % ROWS
    q = tl.arange(0, INNER)
    column = (a * (TILES * INNER))[:, None] + q[None, :]
    corner = tl.arange(0, CHUNK)[:, None] * (chunks * CHUNK) + tl.arange(0, CHUNK)[None, :]
    left = tl.load(left_ptr + corner)
    right = tl.load(right_ptr + q[:, None] * INNER + q[None, :]) if DOT else left
    stride = tl.full((), ROWS * block, tl.int64)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        start = group * stride
        inside = row < rows - group * ROWS
        products = tl.zeros([CHUNK * ROWS], tl.float32)
        parts = ()
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            tiles = ()
            for t in tl.static_range(TILES):
                place = start + (row * block)[:, None] + (c * (CHUNK * TILES * INNER) + t * INNER + column)
                tile = tl.load(grad_ptr + place, mask=mask, other=0.0)
                z = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32)
                products += tl.sum(tile.to(tl.float32) * z, axis=1)
                tiles += (tile,)
            parts += as_operands(inner(tiles, right, TILES, INNER, DOT), left, TILES, INNER, CHUNK, ROWS, OUTER, 1)
        which = group * ROWS + tl.arange(0, ROWS)
        scale = tl.load(scale_ptr + which, mask=which < rows, other=0.0)
        back = _along_rows(_over_rows(products, CHUNK, ROWS) * scale * scale / block, CHUNK, ROWS)
        factor = _along_rows(scale, CHUNK, ROWS) * last
        for c in tl.static_range(chunks):
            real = a < OUTER - c * CHUNK
            mask = (inside & real)[:, None]
            for t in tl.static_range(TILES):
                result = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * factor
                at = c * (CHUNK * TILES * INNER) + t * INNER + column
                place = start + (row * block)[:, None] + at
                result *= tl.load(weight_ptr + at, mask=real[:, None], other=0.0).to(tl.float32)
                result -= tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32) * back
                if MORE:
                    result += tl.load(more_ptr + place, mask=mask, other=0.0).to(tl.float32)
                tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gate_forward(
    gate_ptr, up_ptr, out_ptr, left_ptr, right_ptr, rows, last,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    a = tl.arange(0, CHUNK * ROWS) // ROWS
    row = tl.arange(0, CHUNK * ROWS) % ROWS
    q = tl.arange(0, INNER)
    place = (row * block + a * (TILES * INNER))[:, None] + q[None, :]
    corner = tl.arange(0, CHUNK)[:, None] * (chunks * CHUNK) + tl.arange(0, CHUNK)[None, :]
    left = tl.load(left_ptr + corner)
    right = tl.load(right_ptr + q[:, None] * INNER + q[None, :]) if DOT else left
    stride = tl.full((), ROWS * block, tl.int64)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        start = group * stride
        inside = row < rows - group * ROWS
        parts = ()
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            tiles = ()
            for t in tl.static_range(TILES):
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
                up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
                tiles += (gate * tl.sigmoid(gate) * up,)
            parts += as_operands(inner(tiles, right, TILES, INNER, DOT), left, TILES, INNER, CHUNK, ROWS, OUTER, 1)
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            for t in tl.static_range(TILES):
                result = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * last
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gate_backward(
    grad_ptr, gate_ptr, up_ptr, left_ptr, right_ptr, rows, last,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    a = tl.arange(0, CHUNK * ROWS) // ROWS
    row = tl.arange(0, CHUNK * ROWS) % ROWS
    q = tl.arange(0, INNER)
    place = (row * block + a * (TILES * INNER))[:, None] + q[None, :]
    corner = tl.arange(0, CHUNK)[:, None] * (chunks * CHUNK) + tl.arange(0, CHUNK)[None, :]
    left = tl.load(left_ptr + corner)
    right = tl.load(right_ptr + q[:, None] * INNER + q[None, :]) if DOT else left
    stride = tl.full((), ROWS * block, tl.int64)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        start = group * stride
        inside = row < rows - group * ROWS
        parts = ()
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            tiles = ()
            for t in tl.static_range(TILES):
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                tiles += (tl.load(grad_ptr + at, mask=mask, other=0.0),)
            parts += as_operands(inner(tiles, right, TILES, INNER, DOT), left, TILES, INNER, CHUNK, ROWS, OUTER, 1)
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            for t in tl.static_range(TILES):
                grad = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * last
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
                up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
                share = tl.sigmoid(gate)
                tl.store(up_ptr + at, (grad * gate * share).to(dtype), mask=mask)
                tl.store(gate_ptr + at, (grad * up * share * (1 + gate * (1 - share))).to(dtype), mask=mask)
