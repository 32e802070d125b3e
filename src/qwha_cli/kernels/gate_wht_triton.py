"""Gated activations in the transform's own pass, in Triton; see fused_wht.py and wht_triton.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.fp8 import Fp8Matrix
from qwha_cli.kernels.fp8_triton import fitting, scale_of
from qwha_cli.kernels.fused_wht_triton import room, run
from qwha_cli.kernels.wht_tiles import Tiles, fused_tiles_for
from qwha_cli.kernels.wht_triton import along_rows, as_operands, frame, inner, largest_of_rows, outer, over_rows


def gate_forward(
    gate: Tensor, up: Tensor, *, dtype: torch.dtype, fp8: bool = False, tiles: Tiles | None = None
) -> tuple[Tensor | Fp8Matrix, Tensor | None]:
    """As `fused_wht.gate_wht`; in 8 bits on wish, and then the largest of |silu(gate)| and 1.1 |up| in each row too."""
    gate, up = gate.contiguous(), up.contiguous()
    tiles = tiles or fused_tiles_for("gate", gate.shape[-1], fp8=fp8)
    z, out, rows = room(gate, dtype, fp8=fp8)
    most = torch.empty_like(rows) if fp8 else None
    run(_gate_forward, tiles, (gate, up, out, rows, rows if most is None else most), dtype=dtype, transpose=False, FP8=fp8)
    return z, most


def gate_backward(dz: Tensor, gate: Tensor, up: Tensor, *, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of both inputs, where contiguous ones lay."""
    gate, up, dz = gate.contiguous(), up.contiguous(), dz.contiguous()
    tiles = tiles or fused_tiles_for("gate, backward", gate.shape[-1])
    run(_gate_backward, tiles, (dz, gate, up, gate, up, gate, gate), dtype=dz.dtype, transpose=True, FP8=False)
    return gate, up


def gate_backward_fp8(
    dz: Tensor, gate: Tensor, up: Tensor, most: Tensor, *, tiles: Tiles | None = None
) -> tuple[Fp8Matrix, Fp8Matrix]:
    """The gradients of both inputs as 8-bit numbers, with one scale a row; `most` as `gate_forward` gives it."""
    gate, up, dz = gate.contiguous(), up.contiguous(), dz.contiguous()
    tiles = tiles or fused_tiles_for("gate, backward", gate.shape[-1], fp8=True)
    _, dgate, scales = room(gate, dz.dtype, fp8=True)
    dup = torch.empty_like(dgate)
    run(_gate_backward, tiles, (dz, gate, up, dgate, dup, scales, most), dtype=dz.dtype, transpose=True, FP8=True)
    return Fp8Matrix(dgate, scales), Fp8Matrix(dup, scales)


@triton.jit(do_not_specialize=["rows"])
def _gate_forward(
    gate_ptr, up_ptr, out_ptr, row_ptr, most_ptr, left_ptr, right_ptr, rows, last, FP8: tl.constexpr,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    a, row, column, corner, left, right = frame(left_ptr, right_ptr, OUTER, TILES, INNER, CHUNK, ROWS, DOT)
    place = (row * block)[:, None] + column
    stride = tl.full((), ROWS * block, tl.int64)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        start = group * stride
        inside = row < rows - group * ROWS
        squares = tl.zeros([CHUNK * ROWS], tl.float32)
        most = squares
        parts = ()
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            tiles = ()
            for t in tl.static_range(TILES):
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
                up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
                silu = gate * tl.sigmoid(gate)
                tile = silu * up
                tiles += (tile,)
                if FP8:
                    squares += tl.sum(tile * tile, axis=1)
                    # silu' is at most 1.0999
                    most = tl.maximum(most, tl.max(tl.maximum(tl.abs(silu), 1.1 * tl.abs(up)), axis=1))
            parts += as_operands(inner(tiles, right, TILES, INNER, DOT), left, TILES, INNER, CHUNK, ROWS, OUTER, 1)
        factor = last
        if FP8:
            scale, inverse = scale_of(tl.sqrt(over_rows(squares, CHUNK, ROWS)))
            which = group * ROWS + tl.arange(0, ROWS)
            tl.store(row_ptr + which, scale, mask=which < rows)
            tl.store(most_ptr + which, largest_of_rows(most, CHUNK, ROWS), mask=which < rows)
            factor = along_rows(inverse, CHUNK, ROWS) * last
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            for t in tl.static_range(TILES):
                result = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * factor
                if FP8:
                    result = fitting(result)
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gate_backward(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, row_ptr, most_ptr, left_ptr, right_ptr, rows, last, FP8: tl.constexpr,
    OUTER: tl.constexpr, TILES: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (OUTER + CHUNK - 1) // CHUNK
    block: tl.constexpr = OUTER * TILES * INNER
    dtype: tl.constexpr = dgate_ptr.dtype.element_ty
    a, row, column, corner, left, right = frame(left_ptr, right_ptr, OUTER, TILES, INNER, CHUNK, ROWS, DOT)
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
            parts += as_operands(inner(tiles, right, TILES, INNER, DOT), left, TILES, INNER, CHUNK, ROWS, OUTER, 1)
        factor = last
        piece = left
        if FP8:
            # the scale is known when the largest of a row's gradient is, for which it is computed a first time
            most = tl.zeros([CHUNK * ROWS], tl.float32)
            for c in tl.static_range(chunks):
                for t in tl.static_range(TILES):
                    grad = outer(parts, left, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS)
                    most = tl.maximum(most, tl.max(tl.abs(grad), axis=1))
            which = group * ROWS + tl.arange(0, ROWS)
            other = tl.load(most_ptr + which, mask=which < rows, other=0.0)
            scale, inverse = scale_of(largest_of_rows(most, CHUNK, ROWS) * last * other)
            tl.store(row_ptr + which, scale, mask=which < rows)
            factor = along_rows(inverse, CHUNK, ROWS) * last
            # read anew: the compiler would keep what it has computed, for which there are no registers
            piece = tl.load(left_ptr + corner)
        for c in tl.static_range(chunks):
            mask = (inside & (a < OUTER - c * CHUNK))[:, None]
            for t in tl.static_range(TILES):
                grad = outer(parts, piece, left_ptr, corner, c, t, OUTER, TILES, INNER, CHUNK, ROWS) * factor
                at = start + (c * (CHUNK * TILES * INNER) + t * INNER) + place
                gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
                up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
                share = tl.sigmoid(gate)
                dup = grad * gate * share
                dgate = grad * up * share * (1 + gate * (1 - share))
                if FP8:
                    dgate, dup = fitting(dgate), fitting(dup)
                tl.store(dup_ptr + at, dup.to(dtype), mask=mask)
                tl.store(dgate_ptr + at, dgate.to(dtype), mask=mask)
