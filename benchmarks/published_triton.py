"""The kernel that published.py needs on a GPU: Sylvester's transform of rows of 2^k numbers, each read once and written once."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.hadamard import base_matrix

_NUMBERS = 8192


def sylvester_rows(x: Tensor, scale: float, *, inner: int) -> Tensor:
    """X S · scale along the last axis, which is seen as (size / inner, inner); x contiguous, float32 or bfloat16."""
    size = x.shape[-1]
    outer, rows = size // inner, x.numel() // size
    group = max(1, min(_NUMBERS // size, rows))
    left, right = (_sylvester(order, x.device, x.dtype) for order in (outer, inner))
    out = torch.empty_like(x)
    _rows[(-(-rows // group),)](x, out, left, right, rows, scale, GROUP=group, OUTER=outer, INNER=inner, num_warps=8)
    return out


@lru_cache(maxsize=32)
def _sylvester(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return base_matrix(order).to(device=device, dtype=dtype)


@triton.jit(do_not_specialize=["rows"])
def _rows(
    x_ptr, out_ptr, left_ptr, right_ptr, rows, scale, GROUP: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    line = tl.arange(0, GROUP * OUTER)
    column = tl.arange(0, INNER)
    at = tl.program_id(0).to(tl.int64) * (GROUP * OUTER * INNER) + line[:, None] * INNER + column[None, :]
    mask = (tl.program_id(0) * GROUP + line // OUTER < rows)[:, None]
    tile = tl.load(x_ptr + at, mask=mask, other=0.0)
    right = tl.load(right_ptr + column[:, None] * INNER + column[None, :])
    tile = tl.dot(tile, right).to(x_ptr.dtype.element_ty)
    turned = tl.reshape(tl.permute(tl.reshape(tile, [GROUP, OUTER, INNER]), [0, 2, 1]), [GROUP * INNER, OUTER])
    row = tl.arange(0, OUTER)
    left = tl.load(left_ptr + row[:, None] * OUTER + row[None, :])
    turned = tl.dot(turned, left) * scale
    back = tl.reshape(tl.permute(tl.reshape(turned, [GROUP, INNER, OUTER]), [0, 2, 1]), [GROUP * OUTER, INNER])
    tl.store(out_ptr + at, back.to(out_ptr.dtype.element_ty), mask=mask)
