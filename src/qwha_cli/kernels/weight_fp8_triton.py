"""A weight as 8-bit numbers in Triton, looked up as lookup_triton.py does.

A program writes its tile four bytes at a time: along the row, after it has found the row's scale; or along the column, from four
rows each, whose bytes change places. Entries are written after it: by the same program, along the row, and by a kernel of their
own where the tile takes all registers. What does not lie in whole words, other layouts and groups of odd sizes, is left to
dequantize_triton.py, and its scales are found before.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwha_cli.kernels.backend import interpreted
from qwha_cli.kernels.bytes_triton import quarter_turn
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize_cut import TableCut, fp8_config_for, table_cut_for
from qwha_cli.kernels.dequantize_triton import Form, add_entries, entries_of, gptq_grid, launch, lists_of, operands, span_of
from qwha_cli.kernels.fp8 import E4M3
from qwha_cli.kernels.fp8_triton import inverse_of, scale_of
from qwha_cli.kernels.lookup_triton import TOGETHER_OF, picked
from qwha_cli.kernels.places import Places

_ROWS = 8
_WIDTH = 128
_ENTRY_ROWS, _ENTRY_SLOTS, _ENTRY_WARPS = 2, 64, 1

Entries = tuple[Tensor, Places, float]


def weight_fp8(base: Codes | Tensor, values: Tensor, places: Places, *, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `weight_fp8.weight_fp8`: numbers, scales of rows, and the largest of some scales each."""
    base = base.contiguous() if isinstance(base, Tensor) else base
    rows, columns = places.shape
    weight = torch.empty(places.shape, dtype=E4M3, device=values.device)
    entries = (values.contiguous(), places, scale) if len(places) else None
    with torch.cuda.device_of(values):
        if isinstance(base, Codes) and in_whole_words(base):
            return weight, *launch_rows(weight, base, entries, table_cut_for(is_turned=False))
        found, most = _room(rows, _ROWS, values.device)
        tensors, strides, kind = operands(base, weight)
        _scales[(len(most),)](
            found, most, *tensors, values.contiguous(), places.row_starts, scale, rows, columns, *strides,
            **kind, ROWS=_ROWS, WIDTH=_WIDTH, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        launch(weight, base, entries, fp8_config_for(is_turned=False), form=Form("rows", found, found))
    return weight, found, most


def turned_fp8(base: Codes | Tensor, values: Tensor, places: Places, most: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """As `weight_fp8.turned_fp8`."""
    base = base.contiguous() if isinstance(base, Tensor) else base
    weight = torch.empty(places.shape[::-1], dtype=E4M3, device=values.device)
    same = torch.empty(places.shape[1], dtype=torch.float32, device=values.device)
    entries = (values.contiguous(), places, scale) if len(places) else None
    with torch.cuda.device_of(values):
        if isinstance(base, Codes) and in_whole_words(base):
            launch_turned(weight, base, entries, table_cut_for(is_turned=True), most, same)
        else:
            form = Form("turned", most.amax(), same)
            launch(weight, base, entries, fp8_config_for(is_turned=True), form=form)
    return weight, same


def _room(rows: int, each: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For scales of rows, and for the largest of each so many."""
    sizes = (rows, -(-rows // each))
    found, most = (torch.empty(size, dtype=torch.float32, device=device) for size in sizes)
    return found, most


def in_whole_words(base: Codes) -> bool:
    """Whether numbers can be looked up: codes that are picked together are of one group, and rows and columns whole words."""
    if base.layout != "gptq" or base.bits not in TOGETHER_OF or base.shape[0] % 4 or base.shape[1] % 4:
        return False
    # of what divides a group, tiles are made
    return base.group_size & -base.group_size >= TOGETHER_OF[base.bits]


def launch_rows(weight: Tensor, base: Codes, entries: Entries | None, cut: TableCut) -> tuple[Tensor, Tensor]:
    """Write a weight (out, in) of a base that is `in_whole_words`; its rows' scales, and the largest of some each.

    Args:
        weight: e4m3, contiguous, written as a whole.
        base: (out, in).
        entries: Values (nnz,) of F, their places and the factor on them; None for none.
        cut: How; a program takes all of its rows, whatever span that says.
    """
    rows, columns = base.shape
    found, most = _room(rows, cut.rows, weight.device)
    tensors, strides, how = _operands(base, weight, cut)
    lists, slots = lists_of(entries, weight, columns, rows)
    _rows[(len(most),)](
        weight, weight.view(torch.int32), found, most, *tensors, *lists, rows, columns, *strides,
        **how, SPARSE=entries is not None, WIDTH=_WIDTH, SLOTS=slots,
    )  # fmt: skip
    return found, most


def launch_turned(weight: Tensor, base: Codes, entries: Entries | None, cut: TableCut, most: Tensor, same: Tensor) -> None:
    """Write a weight (in, out) of a base that is `in_whole_words`, and its one scale (in,); `most` as `launch_rows` gives it."""
    rows, columns = base.shape
    tensors, strides, how = _operands(base, weight, cut)
    whole = torch.empty(1, dtype=torch.float32, device=weight.device)
    _turned[(-(-rows // cut.rows), -(-columns // cut.span))](
        weight.view(torch.int32), most, len(most), whole, same, *tensors, rows, columns, cut.span, *strides,
        **how, MOST=triton.next_power_of_2(len(most)),
    )  # fmt: skip
    if entries is not None:
        lists, _ = lists_of(entries, weight, columns, rows)
        kept = {name: how[name] for name in ("BITS", "ZERO_BITS", "GROUP", "enable_fp_fusion")}
        _turned_entries[(-(-rows // _ENTRY_ROWS),)](
            weight, whole, *tensors, *lists, rows, columns, *strides, **kept,
            ROWS=_ENTRY_ROWS, SLOTS=_ENTRY_SLOTS, num_warps=_ENTRY_WARPS,
        )  # fmt: skip


def _operands(base: Codes, weight: Tensor, cut: TableCut) -> tuple[tuple[Tensor, ...], tuple[int, int], dict[str, Any]]:
    tensors, strides, kind = operands(base, weight)
    unit = min(base.group_size & -base.group_size, cut.columns)
    tile = {"UNIT": unit, "TOGETHER": TOGETHER_OF[base.bits], "ROWS": cut.rows, "COLUMNS": cut.columns, "num_warps": cut.warps}
    return (
        tensors,
        strides,
        {n: kind[n] for n in ("BITS", "ZERO_BITS", "GROUP")} | tile | {"ASM": not interpreted(), "enable_fp_fusion": False},
    )


@triton.jit
def _rows(
    weight_ptr, four_ptr, found_ptr, most_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, columns_ptr, factor,
    rows, columns, stride, zero_stride,
    BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, TOGETHER: tl.constexpr,
    SPARSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    inverse = _found(
        found_ptr, most_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, factor, rows, columns, stride, zero_stride,
        "gptq", BITS, ZERO_BITS, GROUP, SPARSE, ROWS, WIDTH,
    )[:, None]  # fmt: skip
    if SPARSE:
        begin, end = span_of(starts_ptr, row, inside)
        mask, column, value = entries_of(values_ptr, columns_ptr, begin, end, 0, factor, SLOTS)
    for start in range(0, columns, COLUMNS):
        x = picked(
            base_ptr, scales_ptr, zeros_ptr, row, inside, inverse, start, rows, columns, stride, zero_stride,
            BITS, ZERO_BITS, GROUP, UNIT, TOGETHER, COLUMNS, ASM,
        )  # fmt: skip
        # side by side in memory: the last index of two that are joined runs fastest
        tile = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3])) if TOGETHER == 16 else tl.join(x[0], x[1])
        at = start // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        place = row.to(tl.int64) * (columns // 4) + at
        tl.store(four_ptr + place, tl.reshape(tile, [ROWS, COLUMNS // 4]), mask=inside & (at < columns // 4))
    if SPARSE:
        add_entries(
            weight_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, columns_ptr, begin, end, mask, column, value, factor,
            inverse, row, rows, columns, stride, zero_stride, columns, 1, "gptq", BITS, ZERO_BITS, GROUP, SLOTS,
        )  # fmt: skip


@triton.jit
def _turned(
    four_ptr, most_ptr, count, whole_ptr, same_ptr, base_ptr, scales_ptr, zeros_ptr, rows, columns, span, stride, zero_stride,
    BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, TOGETHER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MOST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    whole = tl.max(tl.load(most_ptr + tl.arange(0, MOST), mask=tl.arange(0, MOST) < count, other=0.0))
    # all programs the same
    tl.store(whole_ptr, whole)
    inverse = inverse_of(whole)
    row = tl.program_id(0) * ROWS + 4 * tl.arange(0, ROWS // 4)[:, None]
    inside = row < rows
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, columns), COLUMNS):
        four = ()
        for k in tl.static_range(4):
            four += (picked(
                base_ptr, scales_ptr, zeros_ptr, row + k, inside, inverse, start, rows, columns, stride, zero_stride,
                BITS, ZERO_BITS, GROUP, UNIT, TOGETHER, COLUMNS, ASM,
            ),)  # fmt: skip
        at = start + (tl.arange(0, COLUMNS // TOGETHER) * TOGETHER)[None, :]
        for k in tl.static_range(TOGETHER // 4):
            turned = quarter_turn(four[0][k], four[1][k], four[2][k], four[3][k], ASM)
            for j in tl.static_range(4):
                place = (at + (4 * k + j)).to(tl.int64) * (rows // 4) + row // 4
                tl.store(four_ptr + place, turned[j], mask=inside & (at + (4 * k + j) < columns))
        # the programs of the first rows do it for all
        column_at = start + tl.arange(0, COLUMNS)
        mine = column_at < tl.where(tl.program_id(0) == 0, columns, 0)
        tl.store(same_ptr + column_at, tl.zeros([COLUMNS], tl.float32) + whole, mask=mine)


@triton.jit
def _turned_entries(
    weight_ptr, whole_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, columns_ptr, factor,
    rows, columns, stride, zero_stride,
    BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    begin, end = span_of(starts_ptr, row, row < rows)
    mask, column, value = entries_of(values_ptr, columns_ptr, begin, end, 0, factor, SLOTS)
    add_entries(
        weight_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, columns_ptr, begin, end, mask, column, value, factor,
        inverse_of(tl.load(whole_ptr)), row, rows, columns, stride, zero_stride, 1, rows, "gptq", BITS, ZERO_BITS, GROUP, SLOTS,
    )  # fmt: skip


@triton.jit
def _scales(
    found_ptr, most_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, factor, rows, columns, stride, zero_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    _found(
        found_ptr, most_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, factor, rows, columns, stride, zero_stride,
        KIND, BITS, ZERO_BITS, GROUP, True, ROWS, WIDTH,
    )  # fmt: skip


@triton.jit
def _found(
    found_ptr, most_ptr, base_ptr, scales_ptr, zeros_ptr, values_ptr, starts_ptr, factor, rows, columns, stride, zero_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr,
    SPARSE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Find and write the scales of a program's rows, and their largest; one over each (ROWS,)."""
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
    if SPARSE:
        begin = tl.load(starts_ptr + row, mask=inside, other=0)
        end = tl.load(starts_ptr + row + 1, mask=inside, other=0)
        most = tl.max(end - begin)
        for start in range(0, most, WIDTH):
            entry = begin + start + at
            added = _larger(added, tl.load(values_ptr + entry, mask=entry < end, other=0.0).to(tl.float32) * factor)
    scale, inverse = scale_of(tl.max(largest, axis=1) + tl.max(added, axis=1))
    which = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(found_ptr + which, scale, mask=which < rows)
    tl.store(most_ptr + tl.program_id(0), tl.max(tl.where(which < rows, scale, 0.0)))
    return inverse


@triton.jit
def _larger(largest, numbers):
    return tl.maximum(largest, tl.abs(numbers.to(tl.float32)))
