"""How dequantize_triton.py and weight_fp8_triton.py cut a weight: measured beforehand, and never at run time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwha_cli.kernels.codes import Codes


@dataclass(frozen=True)
class Config:
    """How a weight is cut up.

    Args:
        rows: Rows of a program, a power of two.
        columns: Columns of a tile, a power of two, at least 32.
        span: Columns of a program, a multiple of `columns`; 0 for all.
        warps: Of a program.
        stages: Tiles whose loads are under way at once.
    """

    rows: int = 8
    columns: int = 512
    span: int = 512
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class TableCut:
    """How a weight whose 8-bit numbers are looked up is cut; see weight_fp8_triton.py.

    Args:
        rows: Rows of a program, a power of two; at least 8 for turned ones.
        columns: Columns of a tile, a power of two, at least 64.
        span: Columns of a program that writes turned, a multiple of `columns`; along the row it takes all.
        warps: Of a program.
    """

    rows: int
    columns: int
    span: int
    warps: int


CANDIDATES: tuple[Config, ...] = (
    *(
        Config(rows, columns, span, warps)
        for rows, columns, warps in (
            *((8, 128, 2), (8, 128, 4), (8, 256, 4), (8, 256, 8), (8, 512, 4), (8, 512, 8), (16, 128, 4), (16, 128, 8)),
            *((16, 256, 4), (16, 256, 8), (16, 512, 8), (32, 128, 4), (32, 128, 8), (4, 512, 4)),
        )
        for span in (512, 1024, 2048, 0)
    ),
    *(Config(8, columns, 1024, 4, stages=stages) for columns in (256, 512) for stages in (2, 3)),
    *(Config(rows, 1024, span, warps) for rows, warps in ((2, 4), (4, 4), (4, 8), (8, 8)) for span in (1024, 2048)),
)
"""What benchmarks/bench_effective_weight.py times; `config_for` takes from its results."""

TURNED_CANDIDATES: tuple[Config, ...] = tuple(
    Config(rows, columns, span, warps)
    for rows in (32, 64, 128, 256)
    for columns in (32, 64, 128)
    for warps in (4, 8)
    for span in (256, 512, 1024)
    if 2**10 <= rows * columns <= 2**14
)
"""Likewise for weights that are written turned."""


# the best of the candidates on an H100, over seven shapes of layers (docs/results/speed.md)
_PACKED = Config()
_TABLE = Config(rows=4, columns=512, span=1024)
_DENSE = Config(rows=4, columns=512, span=512)
_LOOKED_UP = TableCut(rows=4, columns=2048, span=2048, warps=4)
_LOOKED_UP_TURNED = TableCut(rows=64, columns=256, span=256, warps=2)
_FP8 = Config(rows=4, columns=1024, span=1024)
_FP8_TURNED = Config(rows=32, columns=64, span=256)


def config_for(base: Codes | Tensor | None) -> Config:
    """The cut for a base, which is codes, a dense matrix, or None for zeros."""
    if not isinstance(base, Codes):
        return _DENSE
    # a table look-up takes more registers a number
    return _TABLE if base.layout == "nf4" else _PACKED


TABLE_CANDIDATES: tuple[TableCut, ...] = tuple(
    TableCut(rows, columns, columns, warps) for rows in (1, 2, 4, 8) for columns in (512, 1024, 2048) for warps in (1, 2, 4)
)
"""Likewise for weights whose 8-bit numbers are looked up."""

TURNED_TABLE_CANDIDATES: tuple[TableCut, ...] = tuple(
    TableCut(rows, columns, span, warps)
    for rows in (32, 64, 128, 256)
    for columns in (64, 128, 256)
    for span in (128, 256, 512)
    for warps in (2, 4)
    if columns <= span
)
"""Likewise, turned."""


def table_cut_for(*, is_turned: bool) -> TableCut:
    """The cut of a weight whose numbers are looked up."""
    return _LOOKED_UP_TURNED if is_turned else _LOOKED_UP


def fp8_config_for(*, is_turned: bool) -> Config:
    """The cut for a weight in 8 bits: a turned one is written along its outputs."""
    return _FP8_TURNED if is_turned else _FP8
