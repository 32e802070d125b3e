"""Quantized matrices and places as kernels see them, in sizes that are awkward."""

from __future__ import annotations

import torch

from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.sparse_matmul import SparseRows
from support.quantized import gaussian, options, run_quantizer

Case = tuple[int, int, str, int, int, str]
# (out, in, method, bits, group size, zeros): no powers of two, an odd number of rows, 3-bit rows that end within a word or a
# period, groups of another odd size, zero points finer than the codes, more columns than a tile of the kernel
CASES: list[Case] = [
    (48, 80, "rtn", 2, 16, "integer"),
    (33, 112, "rtn", 3, 16, "integer"),
    (5, 16, "rtn", 3, 16, "integer"),
    (33, 48, "rtn", 3, 48, "fine"),
    (80, 48, "rtn", 2, 16, "fine"),
    (20, 320, "rtn", 4, 64, "integer"),
    (6, 592, "rtn", 8, 16, "integer"),
    (33, 64, "nf4", 4, 64, "integer"),
    (20, 320, "nf4", 4, 64, "integer"),
]
HALF = [torch.bfloat16, torch.float16]


def codes_of(case: Case, device: str = "cpu") -> Codes:
    rows, columns, method, bits, group_size, zeros = case
    packed = run_quantizer(gaussian(rows, columns), None, options(method, bits, group_size, zeros=zeros))
    tensors = {name: tensor.to(device) for name, tensor in packed.tensors.items()}
    return type(packed)(tensors, packed.format, packed.shape).as_codes()


def random_places(shape: tuple[int, int], *, seed: int = 0, density: float = 0.2) -> Places:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    mask[shape[0] // 2] = False  # a row without entries
    return Places.from_rows(SparseRows.from_mask(torch.zeros(shape), mask))
