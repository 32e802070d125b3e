"""How the work of quant_matmul_triton.py is cut into programs: by a rule of the shapes, never by measuring at run time.

The rule's numbers are measured on an H100 with benchmarks/bench_quant_matmul.py. They are constants on every device, so that sums
are added in the same order everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwha_cli.kernels.codes import Codes

PADDED_TOKENS = 16
"""How many tokens the tensor cores multiply where there is more than one."""

# programs that an H100 runs at once
_PROGRAMS = 768


@dataclass(frozen=True)
class Config:
    """How the work is cut. All numbers but slices and pieces are powers of two.

    Attributes:
        outputs: Outputs a program.
        units: Units a tile, of which a program takes one after the other; at least 16 for more than one token.
        slices: Parts that the inputs are cut into.
        pieces: Parts that each row's entries are cut into; 0 to let the programs of the only slice take them.
        entries: Entries of a row at once.
        warps: Of a program.
        stages: Tiles that are under way at once.
        early: Whether codes and entries are read while the kernel before still runs (Hopper's dependent launch): that kernel may
            write the inputs, but nothing of the layer.
    """

    outputs: int
    units: int
    slices: int
    pieces: int
    entries: int
    warps: int
    stages: int = 1
    early: bool = False


@dataclass(frozen=True)
class Unit:
    """The smallest run of codes that fills whole words of the stored tensor.

    Attributes:
        size: Codes.
        words: Words, or bytes.
        part: Neighbouring codes that surely share a scale; divides size.
    """

    size: int
    words: int
    part: int

    @classmethod
    def of(cls, base: Codes) -> Unit:
        """What a matrix is read in."""
        if base.layout == "nf4":
            size = 8 if base.shape[1] % 8 == 0 and base.group_size % 8 == 0 else 2
            return cls(size, 1, size)
        size = 32 if base.bits == 3 else 32 // base.bits
        return cls(size, 3 if base.bits == 3 else 1, math.gcd(size, base.group_size))


def default_config(base: Codes, *, tokens: int, entries: int) -> Config:
    """The rule by which work is cut: as many slices as give every processor of a large GPU something to read."""
    units = _ceil(base.shape[1], Unit.of(base).size)
    # 32 x 32 is the best of 227 cuts of a 3072 x 3072 matrix of 2 bits on an H100; the others are not measured
    outputs, width = (32, 32) if base.layout == "gptq" else (16, 64)
    outputs = max(outputs, PADDED_TOKENS if tokens > 1 else 1)
    blocks = _ceil(base.shape[0], outputs)
    slices = max(1, min(_ceil(units, width), _PROGRAMS // blocks, 16))
    pieces = max(1, min(_ceil(entries, base.shape[0] * 32), _PROGRAMS // blocks, 8))
    return Config(outputs, width, slices, pieces, 16 if tokens == 1 else 4, 2 if base.layout == "gptq" else 4)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
