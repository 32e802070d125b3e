"""Base plus entries of F in Triton, and a matrix read at F's places; see effective_weight.py.

The first is the kernel of weight_tile_triton.py, or of dequantize_triton.py. The second takes some rows a program, whose entries
lie side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels import weight_tile_triton
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize_cut import config_for
from qwha_cli.kernels.dequantize_triton import launch
from qwha_cli.kernels.places import Places

_ROWS, _SLOTS, _WARPS = 2, 256, 4


def added(base: Codes | Tensor | None, values: Tensor, places: Places, *, scale: float, dtype: torch.dtype) -> Tensor:
    """Base + scale · F (out, in), rounded once; without a base, scale · F itself."""
    entries = (values.contiguous(), places, scale) if len(places) else None
    return _written(base, entries, torch.empty(places.shape, dtype=dtype, device=values.device))


def dequantized(codes: Codes, dtype: torch.dtype) -> Tensor:
    """As `dequantize.dequantize`, for float32, bfloat16 and float16."""
    return _written(codes, None, torch.empty(codes.shape, dtype=dtype, device=codes.device))


def _written(base: Codes | Tensor | None, entries: tuple[Tensor, Places, float] | None, weight: Tensor) -> Tensor:
    if not isinstance(base, Tensor) and weight_tile_triton.takes(base, weight.dtype, weight.shape[1]):
        weight_tile_triton.launch(weight, base, entries)
    else:
        launch(weight, base.contiguous() if isinstance(base, Tensor) else base, entries, config_for(base))
    return weight


def gather(matrix: Tensor, places: Places, *, scale: float) -> Tensor:
    """Scale times the matrix at F's places, float32 (nnz,)."""
    rows, columns = places.shape
    found = torch.empty(len(places), dtype=torch.float32, device=matrix.device)
    _gather[(-(-rows // _ROWS),)](
        matrix.contiguous(), places.row_starts, places.columns, found, scale, rows, columns,
        ROWS=_ROWS, SLOTS=_SLOTS, num_warps=_WARPS,
    )  # fmt: skip
    return found


@triton.jit
def _gather(
    matrix_ptr, starts_ptr, columns_ptr, found_ptr, scale, rows, columns, ROWS: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    begin = tl.load(starts_ptr + row, mask=row < rows, other=0)
    end = tl.load(starts_ptr + row + 1, mask=row < rows, other=0)
    most = tl.max(end - begin)
    for start in range(0, most, SLOTS):
        entry = begin + start + tl.arange(0, SLOTS)[None, :]
        mask = entry < end
        column = tl.load(columns_ptr + entry, mask=mask, other=0).to(tl.int32)
        value = tl.load(matrix_ptr + row.to(tl.int64) * columns + column, mask=mask, other=0.0)
        tl.store(found_ptr + entry, value.to(tl.float32) * scale, mask=mask)
