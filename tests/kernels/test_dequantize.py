"""Dequantization: exactly scale times code minus zero, rounded once, and the same bits from Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dense_base, dequantize
from support.codes import CASES, HALF, Case, codes_of
from support.triton import HAS_TRITON, run_interpreted


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_torch_rounds_the_float32_numbers_once(case: Case, dtype: torch.dtype) -> None:
    codes = codes_of(case)
    found = dequantize(codes, dtype)
    assert found.is_contiguous()
    assert tuple(found.shape) == codes.shape
    # float32 holds every product of the integer kind, and is what nf4 is computed in
    assert torch.equal(found, dequantize(codes, torch.float64).to(dtype))


def test_a_dense_base_is_itself_and_codes_are_dequantized() -> None:
    weight = torch.randn(3, 4)
    assert dense_base(weight, torch.float32) is weight
    assert dense_base(weight, torch.bfloat16).dtype == torch.bfloat16
    codes = codes_of(CASES[0])
    assert torch.equal(dense_base(codes, torch.float32), dequantize(codes, torch.float32))


def test_float64_is_torchs() -> None:
    with pytest.raises(KernelError, match=r"writes no torch\.float64") as caught:
        dequantize(codes_of(CASES[0]), torch.float64, backend="triton")
    assert caught.value.remedy == "use backend auto or torch"


def as_torch(codes: Codes, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        assert torch.equal(dequantize(codes, dtype, backend="triton"), dequantize(codes, dtype, backend="torch"))


def cut_otherwise(codes: Codes) -> None:
    """Other sizes of programs and tiles, too; each writes the whole matrix."""
    from qwha_cli.kernels.dequantize_triton import Config, launch

    expected: Tensor = dequantize(codes, torch.float32, backend="torch")
    for config in (Config(8, 32, 64), Config(32, 64, 0, stages=2), Config(4, 512, 512)):
        weight = torch.full_like(expected, torch.nan)
        launch(weight, codes, None, config)
        assert torch.equal(weight, expected), config


# Triton's interpreter cuts numbers to bfloat16 instead of rounding them
_INTERPRETED = """
import torch
from kernels.test_dequantize import CASES, as_torch, codes_of, cut_otherwise
for codes in map(codes_of, CASES):
    as_torch(codes, [torch.float32, torch.float16])
for number in (1, 4, 7):
    cut_otherwise(codes_of(CASES[number]))
print("interpreted", len(CASES))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_interpreted_gives_torchs_bits() -> None:
    assert run_interpreted(_INTERPRETED) == f"interpreted {len(CASES)}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [*CASES, (515, 3072, "rtn", 2, 64, "fine"), (1024, 4096, "rtn", 3, 128, "integer")])
def test_triton_on_a_gpu_gives_torchs_bits(case: Case) -> None:
    codes = codes_of(case, "cuda")
    as_torch(codes, [*HALF, torch.float32])
    cut_otherwise(codes)
