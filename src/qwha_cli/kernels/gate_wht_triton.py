"""Gated activations in the transform's own pass, in Triton; see fused_wht.py and wht_triton.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.fp8 import Fp8Matrix
from qwha_cli.kernels.fp8_triton import fitting
from qwha_cli.kernels.fused_wht_triton import room, run
from qwha_cli.kernels.wht_tiles import Tiles, fused_tiles_for
from qwha_cli.kernels.wht_triton import along_rows, as_operands, as_read, frame, inner, outer, over_rows, written_scales


def gate_forward(
    gate: Tensor, up: Tensor, *, dtype: torch.dtype, fp8: bool = False, tiles: Tiles | None = None
) -> Tensor | Fp8Matrix:
    """As `fused_wht.gate_wht`, in 8 bits on wish."""
    gate, up = gate.contiguous(), up.contiguous()
    tiles = tiles or fused_tiles_for("gate", gate.shape[-1], fp8=fp8)
    z, out, rows = room(gate, dtype, fp8=fp8)
    run(_gate_forward, tiles, (gate, up, out, rows), dtype=dtype, transpose=False, FP8=fp8)
    return z


def gate_backward(dz: Tensor, gate: Tensor, up: Tensor, *, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of both inputs, where contiguous ones lay."""
    gate, up, dz = gate.contiguous(), up.contiguous(), dz.contiguous()
    tiles = tiles or fused_tiles_for("gate, backward", gate.shape[-1])
    run(_gate_backward, tiles, (dz, gate, up), dtype=dz.dtype, transpose=True)
    return gate, up


@triton.jit(do_not_specialize=["rows"])
def _gate_forward(
    gate_ptr, up_ptr, out_ptr, row_ptr, left_ptr, right_ptr, rows, last, FP8: tl.constexpr,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    a, row, column, corner, left, right = frame(left_ptr, right_ptr, OUTER, TILES, INNER, CHUNK, ROWS, WAY)
    place = (row * block)[:, None] + column
    stride = tl.full((), ROWS * block, tl.int64)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        start = group * stride
        inside = row < rows - group * ROWS
        squares = tl.zeros([CHUNK * ROWS], tl.float32)
        parts = ()
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            tiles = ()
            for t in tl.static_range(TILES):
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
                up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
                tile = gate * tl.sigmoid(gate) * up
                tiles += (tile,)
                if FP8:
                    squares += tl.sum(tile * tile, axis=1)
            parts += as_operands(inner(tiles, right, TILES, INNER, WAY), left, TILES, INNER, CHUNK, ROWS, OUTER, 1)
        factor = last
        if FP8:
            inverse = written_scales(tl.sqrt(over_rows(squares, CHUNK, ROWS)), row_ptr, group, rows, ROWS)
            factor = along_rows(inverse, CHUNK, ROWS) * last
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            for t in tl.static_range(TILES):
                result = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * factor
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                if FP8:
                    result = fitting(result)
                    # as in wht_triton: all tensors in one layout
                    at = tl.max_contiguous(at, [1, 8])
                tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gate_backward(
    grad_ptr, gate_ptr, up_ptr, left_ptr, right_ptr, rows, last,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    a, row, column, corner, left, right = frame(left_ptr, right_ptr, OUTER, TILES, INNER, CHUNK, ROWS, WAY)
    place = (row * block)[:, None] + column
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
            parts += as_operands(inner(tiles, right, TILES, INNER, WAY), left, TILES, INNER, CHUNK, ROWS, OUTER, 1)
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            for t in tl.static_range(TILES):
                grad = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * last
                grad = as_read(grad, CHUNK, ROWS, INNER)
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
                up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
                share = tl.sigmoid(gate)
                tl.store(up_ptr + at, (grad * gate * share).to(dtype), mask=mask)
                tl.store(gate_ptr + at, (grad * up * share * (1 + gate * (1 - share))).to(dtype), mask=mask)
