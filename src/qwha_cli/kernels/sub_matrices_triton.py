"""Sub-matrices in Triton: a program gathers a tile of one set's lower triangle; see sub_matrices.py.

The gather reads single numbers of a matrix that is larger than the cache, so its cost is the number of sectors touched: half of
them where only the lower triangle is fetched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 32


def sub_matrices(square: Tensor, columns: Tensor) -> Tensor:
    """As `sub_matrices.sub_matrices`."""
    batch, width = columns.shape
    gathered = torch.empty((batch, width, width), dtype=square.dtype, device=square.device)
    tiles = triton.cdiv(width, _TILE)
    _gather[(batch, tiles, tiles)](
        square, columns.to(torch.int32).contiguous(), gathered, square.shape[0] - 1, square.stride(0), width, TILE=_TILE
    )
    return gathered


@triton.jit
def _gather(square_ptr, columns_ptr, gathered_ptr, size, stride, width, TILE: tl.constexpr):
    row, column = tl.program_id(1), tl.program_id(2)
    i = row * TILE + tl.arange(0, TILE)
    j = column * TILE + tl.arange(0, TILE)
    member = tl.program_id(0).to(tl.int64)
    a = tl.load(columns_ptr + member * width + i, mask=i < width, other=size)
    b = tl.load(columns_ptr + member * width + j, mask=j < width, other=size)
    # the lower triangle, in whole tiles
    inside = (i[:, None] < width) & (j[None, :] < width) & (j[None, :] // TILE <= i[:, None] // TILE)
    value = tl.load(square_ptr + a.to(tl.int64)[:, None] * stride + b[None, :], mask=inside, other=0.0)
    value = tl.where((i[:, None] == j[None, :]) & (a[:, None] == size), 1.0, value)
    tl.store(gathered_ptr + member * width * width + i[:, None] * width + j[None, :], value, mask=inside)
