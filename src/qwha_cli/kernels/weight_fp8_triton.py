"""A weight as 8-bit numbers in Triton: the scales in a kernel of their own, the numbers by that of dequantize_triton.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize_cut import fp8_config_for
from qwha_cli.kernels.dequantize_triton import Form, gptq_grid, launch, operands
from qwha_cli.kernels.fp8 import E4M3
from qwha_cli.kernels.fp8_triton import scale_of
from qwha_cli.kernels.places import Places

_ROWS = 8
_WIDTH = 128


def weight_scales(base: Codes | Tensor, values: Tensor, places: Places, *, scale: float) -> tuple[Tensor, Tensor]:
    """As `weight_fp8.weight_scales`."""
    rows, columns = places.shape
    base = base.contiguous() if isinstance(base, Tensor) else base
    found = torch.empty(rows, dtype=torch.float32, device=values.device)
    # a float32 number that is not negative is ordered as its bits are
    whole = torch.zeros((), dtype=torch.float32, device=values.device)
    tensors, strides, kind = operands(base, found)
    with torch.cuda.device_of(values):
        _scales[(-(-rows // _ROWS),)](
            found, whole.view(torch.int32), *tensors, values.contiguous(), places.row_starts, scale, rows, columns, *strides,
            **kind, ROWS=_ROWS, WIDTH=_WIDTH, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return found, whole


def weight_fp8(
    base: Codes | Tensor, values: Tensor, places: Places, scales: tuple[Tensor, Tensor], *, scale: float, is_turned: bool
) -> tuple[Tensor, Tensor]:
    """As `weight_fp8.weight_fp8`."""
    rows, whole = scales
    base = base.contiguous() if isinstance(base, Tensor) else base
    shape = (places.shape[1], places.shape[0]) if is_turned else places.shape
    weight = torch.empty(shape, dtype=E4M3, device=values.device)
    entries = (values.contiguous(), places, scale) if len(places) else None
    same = torch.empty(shape[0], dtype=torch.float32, device=values.device) if is_turned else rows
    form = Form("turned", whole, same) if is_turned else Form("rows", rows, rows)
    with torch.cuda.device_of(values):
        launch(weight, base, entries, fp8_config_for(base, is_turned=is_turned), form=form)
    return weight, same


@triton.jit
def _scales(
    found_ptr, whole_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, factor, rows, columns, stride, zero_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    at = tl.arange(0, WIDTH)[None, :]
    largest = tl.zeros([ROWS, WIDTH], tl.float32)
    if KIND == "dense":
        for start in range(0, columns, WIDTH):
            column = start + at
            mask = inside & (column < columns)
            largest = _larger(largest, tl.load(base_ptr + row.to(tl.int64) * columns + column, mask=mask, other=0.0))
    else:
        groups = columns // GROUP
        for start in range(0, groups, WIDTH):
            group = start + at
            mask = inside & (group < groups)
            if KIND == "gptq":
                step, low = gptq_grid(scales_ptr, zeros_ptr, row, group, mask, rows, stride, zero_stride, BITS, ZERO_BITS)
                largest = _larger(_larger(largest, low), low + step * ((1 << BITS) - 1.0))
            else:
                step = tl.load(scales_ptr + row.to(tl.int64) * groups + group, mask=mask, other=0.0)
                table = tl.load(zeros_ptr + tl.arange(0, 16))
                largest = _larger(largest, step * tl.max(tl.abs(table)))
    added = tl.zeros([ROWS, WIDTH], tl.float32)
    begin = tl.load(starts_ptr + row, mask=inside, other=0)
    end = tl.load(starts_ptr + row + 1, mask=inside, other=0)
    most = tl.max(end - begin)
    for start in range(0, most, WIDTH):
        entry = begin + start + at
        added = _larger(added, tl.load(values_ptr + entry, mask=entry < end, other=0.0).to(tl.float32) * factor)
    scale, _ = scale_of(tl.max(largest, axis=1) + tl.max(added, axis=1))
    which = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(found_ptr + which, scale, mask=which < rows)
    tl.atomic_max(whole_ptr, tl.max(tl.where(which < rows, scale, 0.0)).to(tl.int32, bitcast=True))


@triton.jit
def _larger(largest, numbers):
    return tl.maximum(largest, tl.abs(numbers.to(tl.float32)))
