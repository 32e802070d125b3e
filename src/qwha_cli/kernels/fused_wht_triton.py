"""Norms in the transform's own pass, in Triton, and how such kernels are launched; see fused_wht.py and wht_triton.py.

A program's tiles are those of the transform. A row's sums are taken while its tiles are read, over q in a tile, then over a; what
is constant along a row, the norm, is multiplied after the transform, which is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from qwha_cli.kernels.fp8 import E4M3, Fp8Matrix
from qwha_cli.kernels.fp8_triton import fitting
from qwha_cli.kernels.wht_tiles import Tiles, fused_tiles_for
from qwha_cli.kernels.wht_triton import (
    along_rows,
    as_operands,
    as_read,
    frame,
    inner,
    last_factor,
    matrices,
    operand_dtype,
    outer,
    over_rows,
    written_scales,
)

# of a gradient that are added as they are read: those of queries, keys and values
_MOST_PARTS = 3


def norm_forward(
    x: Tensor,
    add: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    fp8: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Tensor | Fp8Matrix, Tensor, Tensor]:
    """z, h as in `fused_wht.norm_wht`, z in 8 bits on wish, and 1 / rms(h) of every row, float32."""
    x = x.contiguous()
    tiles = tiles or fused_tiles_for("norm" if add is None else "norm of a sum", x.shape[-1], fp8=fp8)
    z, out, rows = room(x, dtype, fp8=fp8)
    h = x if add is None else torch.empty_like(x)
    scales = torch.empty(x.numel() // tiles.block, dtype=torch.float32, device=x.device)
    tensors = (x, x if add is None else add.contiguous(), weight.contiguous(), h, out, rows, scales)
    run(_norm_forward, tiles, (*tensors, eps), dtype=dtype, transpose=False, ADD=add is not None, FP8=fp8)
    return z, h, scales


def norm_backward(
    parts: Sequence[Tensor],
    z: Tensor | Fp8Matrix,
    h: Tensor,
    weight: Tensor,
    scales: Tensor,
    dh: Tensor | None,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """The gradient of h, of its dtype, with `dh` added, from that of z, which is the sum of `parts`."""
    h, dz = h.contiguous(), [part.contiguous() for part in parts]
    if len(dz) > _MOST_PARTS:
        dz[_MOST_PARTS - 1 :] = [sum(dz[_MOST_PARTS:], dz[_MOST_PARTS - 1])]
    tiles = tiles or fused_tiles_for("norm, backward", h.shape[-1], fp8=isinstance(z, Fp8Matrix))
    total = torch.empty_like(h)
    numbers, rows = (z.values, z.scales) if isinstance(z, Fp8Matrix) else (z, scales)
    given = (*dz, *[dz[0]] * (_MOST_PARTS - len(dz)))
    tensors = (*given, numbers, rows, h, weight.contiguous(), scales, h if dh is None else dh.contiguous(), total)
    flags = {"MORE": dh is not None, "FP8": isinstance(z, Fp8Matrix), "PARTS": len(dz)}
    run(_norm_backward, tiles, tensors, dtype=dz[0].dtype, transpose=True, **flags)
    return total


def room(x: Tensor, dtype: torch.dtype, *, fp8: bool) -> tuple[Tensor | Fp8Matrix, Tensor, Tensor]:
    """Room for the transform of x (..., n): the result, where its numbers go, and where its scales go, if there are any."""
    if not fp8:
        z = torch.empty(x.shape, dtype=dtype, device=x.device)
        return z, z, z
    values = torch.empty(x.numel() // x.shape[-1], x.shape[-1], dtype=E4M3, device=x.device)
    form = Fp8Matrix(values, torch.empty(values.shape[0], dtype=torch.float32, device=x.device))
    return form, form.values, form.scales


def run(
    kernel: JITFunction[..., None],
    tiles: Tiles,
    first: tuple[Tensor | float, ...],
    *,
    dtype: torch.dtype,
    transpose: bool,
    **flags: int,
) -> None:
    """Launch a kernel whose arguments are its own, `first`, and then those that all have: A, S_q, rows and factor."""
    like = cast(Tensor, first[0])
    rows = like.numel() // tiles.block
    if not rows:
        return
    left, right = matrices(tiles, operand_dtype(dtype), like.device, transpose)
    groups = -(-rows // tiles.rows)
    # the tensors may lie on another device than the current one
    with torch.cuda.device_of(like):
        kernel[(min(groups, tiles.programs or groups),)](
            *first, left, right, rows, last_factor(tiles), **flags,
            OUTER=tiles.outer, TILES=tiles.tiles, INNER=tiles.inner, CHUNK=tiles.chunk, ROWS=tiles.rows,
            WAY=tiles.way, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _norm_forward(
    x_ptr, add_ptr, weight_ptr, sum_ptr, out_ptr, row_ptr, scale_ptr, eps, left_ptr, right_ptr, rows, last,
    ADD: tl.constexpr, FP8: tl.constexpr,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    a, row, column, corner, left, right = frame(left_ptr, right_ptr, OUTER, TILES, INNER, CHUNK, ROWS, WAY)
    stride = tl.full((), ROWS * block, tl.int64)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        start = group * stride
        inside = row < rows - group * ROWS
        squares = tl.zeros([CHUNK * ROWS], tl.float32)
        weighted = squares
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
                tile *= tl.load(weight_ptr + at, mask=real[:, None], other=0.0).to(tl.float32)
                if FP8:
                    weighted += tl.sum(tile * tile, axis=1)
                tiles += (tile,)
            parts += as_operands(inner(tiles, right, TILES, INNER, WAY), left, TILES, INNER, CHUNK, ROWS, OUTER, 1)
        scale = tl.rsqrt(over_rows(squares, CHUNK, ROWS) / block + eps)
        which = group * ROWS + tl.arange(0, ROWS)
        tl.store(scale_ptr + which, scale, mask=which < rows)
        if FP8:
            scale *= written_scales(scale * tl.sqrt(over_rows(weighted, CHUNK, ROWS)), row_ptr, group, rows, ROWS)
        factor = along_rows(scale, CHUNK, ROWS) * last
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            for t in tl.static_range(TILES):
                result = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * factor
                place = start + (row * block)[:, None] + (c * (CHUNK * TILES * INNER) + t * INNER + column)
                if FP8:
                    result = fitting(result)
                    # as in wht_triton: all tensors in one layout
                    place = tl.max_contiguous(place, [1, 8])
                tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    grad_ptr, second_ptr, third_ptr, z_ptr, row_ptr, h_ptr, weight_ptr, scale_ptr, more_ptr, out_ptr, left_ptr, right_ptr,
    rows, last, MORE: tl.constexpr, FP8: tl.constexpr, PARTS: tl.constexpr,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    a, row, column, corner, left, right = frame(left_ptr, right_ptr, OUTER, TILES, INNER, CHUNK, ROWS, WAY)
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
                if PARTS > 1:
                    whole = tile.to(tl.float32) + tl.load(second_ptr + place, mask=mask, other=0.0).to(tl.float32)
                    if PARTS > 2:
                        whole += tl.load(third_ptr + place, mask=mask, other=0.0).to(tl.float32)
                    tile = whole.to(grad_ptr.dtype.element_ty)
                if FP8:
                    # as in wht_triton: all tensors in one layout
                    place = tl.max_contiguous(place, [1, 8])
                z = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32)
                products += tl.sum(tile.to(tl.float32) * z, axis=1)
                tiles += (tile,)
            parts += as_operands(inner(tiles, right, TILES, INNER, WAY), left, TILES, INNER, CHUNK, ROWS, OUTER, 1)
        which = group * ROWS + tl.arange(0, ROWS)
        scale = tl.load(scale_ptr + which, mask=which < rows, other=0.0)
        product = over_rows(products, CHUNK, ROWS)
        if FP8:
            product *= tl.load(row_ptr + which, mask=which < rows, other=0.0)
        back = along_rows(product * scale * scale / block, CHUNK, ROWS)
        factor = along_rows(scale, CHUNK, ROWS) * last
        for c in tl.static_range(chunks):
            real = a < OUTER - c * CHUNK
            mask = (inside & real)[:, None]
            for t in tl.static_range(TILES):
                result = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * factor
                result = as_read(result, CHUNK, ROWS, INNER)
                at = c * (CHUNK * TILES * INNER) + t * INNER + column
                place = start + (row * block)[:, None] + at
                result *= tl.load(weight_ptr + at, mask=real[:, None], other=0.0).to(tl.float32)
                result -= tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32) * back
                if MORE:
                    result += tl.load(more_ptr + place, mask=mask, other=0.0).to(tl.float32)
                tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=mask)
