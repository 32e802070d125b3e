"""Row solves in Triton: a program takes one row at a time from gather to values; see row_solve.py.

The sub-matrix, scaled to a unit diagonal, is inverted in place by the symmetric sweep operator (Goodnight 1979), some columns at
a time; only its lower triangle of blocks is kept, in memory that belongs to the program and stays in the cache:

    C_i = A_ip,  A_ip ← C_i A_pp⁻¹,  A_ij ← A_ij − A_ip C_jᵀ,  A_pp ← −A_pp⁻¹     for each block p; in the end A holds −A⁻¹.

A positive definite matrix needs no pivoting for it. Products take three TF32 parts, as exact as float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# measured on an H100 for rows of 88 to 256 entries: 64 and four warps take 0.9 to 2.1 times as long
_BLOCK = 32
_WARPS = 2
# programs at once; half as many take up to 1.1 times as long
_PROGRAMS = 1056
_SCRATCH_BYTES = 2**30


def row_solve(
    gram: Tensor, right: Tensor, row_starts: Tensor, columns: Tensor, *, with_losses: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `row_solve.row_solve`, in float32; there is an entry."""
    device = gram.device
    counts = row_starts[1:] - row_starts[:-1]
    width = triton.cdiv(int(counts.max()), _BLOCK) * _BLOCK
    blocks = width // _BLOCK
    # a triangle of blocks, and the two columns of blocks of a sweep
    slot = (blocks * (blocks + 1) // 2 + 2 * blocks) * _BLOCK**2
    programs = max(1, min(_PROGRAMS, counts.numel(), _SCRATCH_BYTES // (4 * slot)))
    scratch = torch.empty(programs * slot, dtype=torch.float32, device=device)
    values = torch.empty(columns.numel(), dtype=torch.float32, device=device)
    losses = torch.empty_like(values) if with_losses else None
    failed = torch.zeros((), dtype=torch.int32, device=device)
    # the longest rows first, so that no program ends with one
    order = counts.argsort(descending=True, stable=True).to(torch.int32)
    _solve_rows[(programs,)](
        gram, right, order, row_starts, columns, values, losses if losses is not None else values, failed, scratch,
        counts.numel(), gram.shape[0] - 1, gram.stride(0), right.stride(0), slot,
        LOSSES=with_losses, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return values, losses, failed


@triton.jit
def _columns_of(columns_ptr, start, count, block, size, BLOCK: tl.constexpr):
    """The columns of a block of a row; `size`, where the Gram matrix has zeros, behind its end."""
    slots = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(columns_ptr + start + slots, mask=slots < count, other=size).to(tl.int64)


@triton.jit
def _scales_of(gram_ptr, columns, stride, size):
    """What scales the diagonal to one."""
    diagonal = tl.load(gram_ptr + columns * stride + columns)
    return tl.where(columns == size, 1.0, tl.rsqrt(diagonal))


@triton.jit
def _inverse(tile, BLOCK: tl.constexpr):
    """−A⁻¹ of a block with a unit diagonal or a Schur complement of one, and whether it is positive definite."""
    i = tl.arange(0, BLOCK)
    positive = tl.sum(tile) == tl.sum(tile)  # not with a NaN
    for k in range(BLOCK):
        column = tl.sum(tl.where(i[None, :] == k, tile, 0.0), axis=1)
        pivot = tl.sum(tl.where(i == k, column, 0.0), axis=0)
        positive = positive & (pivot > 0)
        # one update for the pivot's row and column and all others; it leaves 2 too much on the diagonal, which nothing reads
        column = tl.where(i == k, pivot - 1.0, column)
        tile -= (column / pivot)[:, None] * column[None, :]
    return tl.where(i[:, None] == i[None, :], tile - 2.0, tile), positive


@triton.jit
def _solve_rows(
    gram_ptr, right_ptr, order_ptr, starts_ptr, columns_ptr, values_ptr, losses_ptr, failed_ptr, scratch_ptr,
    rows, size, stride, right_stride, slot, LOSSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * slot
    i = tl.arange(0, BLOCK)
    inner = i[:, None] * BLOCK + i[None, :]
    tile_size: tl.constexpr = BLOCK * BLOCK
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.load(order_ptr + index).to(tl.int64)
        start = tl.load(starts_ptr + row).to(tl.int64)
        count = tl.load(starts_ptr + row + 1).to(tl.int64) - start
        blocks = ((count + BLOCK - 1) // BLOCK).to(tl.int32)
        # block (a, b), b <= a, is tile a (a + 1) / 2 + b; behind them the blocks C_i and A_ip of a sweep
        panel_ptr = matrix_ptr + (blocks * (blocks + 1) // 2) * tile_size
        turned_ptr = panel_ptr + blocks * tile_size
        for a in range(blocks):
            of_a = _columns_of(columns_ptr, start, count, a, size, BLOCK)
            scale_a = _scales_of(gram_ptr, of_a, stride, size)
            for b in range(a + 1):
                of_b = _columns_of(columns_ptr, start, count, b, size, BLOCK)
                scale_b = _scales_of(gram_ptr, of_b, stride, size)
                tile = tl.load(gram_ptr + of_a[:, None] * stride + of_b[None, :]) * scale_a[:, None] * scale_b[None, :]
                tile = tl.where((a * BLOCK + i[:, None]) == (b * BLOCK + i[None, :]), 1.0, tile)
                tl.store(matrix_ptr + (a * (a + 1) // 2 + b) * tile_size + inner, tile)
        tl.debug_barrier()
        positive = count >= 0
        for p in range(blocks):
            pivot_ptr = matrix_ptr + (p * (p + 1) // 2 + p) * tile_size
            negative, fine = _inverse(tl.load(pivot_ptr + inner), BLOCK)
            positive = positive & fine
            for a in range(p):
                at = matrix_ptr + (p * (p + 1) // 2 + a) * tile_size + inner
                panel = tl.trans(tl.load(at))
                turned = -tl.dot(panel, negative, input_precision="tf32x3")
                tl.store(panel_ptr + a * tile_size + inner, panel)
                tl.store(turned_ptr + a * tile_size + inner, turned)
                tl.store(at, tl.trans(turned))
            for a in range(p + 1, blocks):
                at = matrix_ptr + (a * (a + 1) // 2 + p) * tile_size + inner
                panel = tl.load(at)
                turned = -tl.dot(panel, negative, input_precision="tf32x3")
                tl.store(panel_ptr + a * tile_size + inner, panel)
                tl.store(turned_ptr + a * tile_size + inner, turned)
                tl.store(at, turned)
            tl.store(pivot_ptr + inner, negative)
            tl.debug_barrier()
            for a in range(blocks):
                if a != p:
                    turned = tl.load(turned_ptr + a * tile_size + inner)
                    for b in range(a + 1):
                        if b != p:
                            panel = tl.load(panel_ptr + b * tile_size + inner)
                            at = matrix_ptr + (a * (a + 1) // 2 + b) * tile_size + inner
                            product = tl.dot(turned, tl.trans(panel), input_precision="tf32x3")
                            tl.store(at, tl.load(at) - product)
            tl.debug_barrier()
        for a in range(blocks):
            of_a = _columns_of(columns_ptr, start, count, a, size, BLOCK)
            scale_a = _scales_of(gram_ptr, of_a, stride, size)
            solved = tl.zeros((BLOCK,), tl.float32)
            for b in range(blocks):
                of_b = _columns_of(columns_ptr, start, count, b, size, BLOCK)
                known = tl.load(right_ptr + row * right_stride + of_b, mask=of_b < size, other=0.0)
                known *= _scales_of(gram_ptr, of_b, stride, size)
                if b <= a:
                    tile = tl.load(matrix_ptr + (a * (a + 1) // 2 + b) * tile_size + inner)
                    solved -= tl.sum(tile * known[None, :], axis=1)
                else:
                    tile = tl.load(matrix_ptr + (b * (b + 1) // 2 + a) * tile_size + inner)
                    solved -= tl.sum(tile * known[:, None], axis=0)
            solved *= scale_a
            slots = a * BLOCK + i
            tl.store(values_ptr + start + slots, solved, mask=slots < count)
            if LOSSES:
                worth = -tl.load(matrix_ptr + (a * (a + 1) // 2 + a) * tile_size + i * (BLOCK + 1)) * scale_a * scale_a
                tl.store(losses_ptr + start + slots, solved * solved / worth, mask=slots < count)
        if not positive:
            tl.atomic_add(failed_ptr, 1)
        tl.debug_barrier()
