"""Dequantization: exactly scale times code minus zero, rounded once, and the same bits from Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dense_base, dequantize, dequantize_span, gather_rows
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


WIDE: list[Case] = [(131, 80, "rtn", 8, 16, "integer"), (77, 48, "rtn", 2, 16, "fine"), (99, 112, "rtn", 4, 16, "integer")]


@pytest.mark.parametrize("case", WIDE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_chosen_rows_are_those_of_the_whole_matrix(case: Case, dtype: torch.dtype) -> None:
    codes = codes_of(case)
    whole = dequantize(codes, dtype)
    rows = torch.tensor([case[0] - 1, 0, 33, 33, 5, 64])
    assert torch.equal(gather_rows(codes, rows, dtype), whole[rows])
    assert gather_rows(codes, rows[:0], dtype).shape == (0, case[1])


@pytest.mark.parametrize("case", [*WIDE, (99, 112, "rtn", 3, 16, "integer")])
def test_a_span_of_rows_is_that_of_the_whole_matrix(case: Case) -> None:
    codes = codes_of(case)
    whole = dequantize(codes, torch.bfloat16)
    for start, stop in ((0, 32), (32, 64), (64, 1000), (32, 33)):
        assert torch.equal(dequantize_span(codes, start, stop, torch.bfloat16), whole[start:stop])


def test_rows_that_share_words_are_refused() -> None:
    codes = codes_of(WIDE[0])
    with pytest.raises(KernelError, match="multiple of 32, not at 16"):
        dequantize_span(codes, 16, 32, torch.float32)
    with pytest.raises(KernelError, match="zero points of 3 bits"):
        gather_rows(codes_of((33, 112, "rtn", 3, 16, "integer")), torch.tensor([0]), torch.float32)
    nf4 = codes_of((33, 64, "nf4", 4, 64, "integer"))
    with pytest.raises(KernelError, match="layout nf4"):
        gather_rows(nf4, torch.tensor([0]), torch.float32)
    with pytest.raises(KernelError, match="layout nf4"):
        dequantize_span(nf4, 0, 32, torch.float32)


def spans_as_torch(codes: Codes, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        whole = dequantize(codes, dtype, backend="torch")
        for start, stop in ((0, 64), (32, 96), (64, 1000)):
            assert torch.equal(dequantize_span(codes, start, stop, dtype, backend="triton"), whole[start:stop])


def test_float64_is_torchs() -> None:
    with pytest.raises(KernelError, match=r"writes no torch\.float64") as caught:
        dequantize(codes_of(CASES[0]), torch.float64, backend="triton")
    assert caught.value.remedy == "use backend auto or torch"


def as_torch(codes: Codes, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        assert torch.equal(dequantize(codes, dtype, backend="triton"), dequantize(codes, dtype, backend="torch"))


def cut_otherwise(codes: Codes) -> None:
    """Other sizes of programs and tiles, too; each writes the whole matrix."""
    from qwha_cli.kernels.dequantize_cut import Config
    from qwha_cli.kernels.dequantize_triton import launch

    expected: Tensor = dequantize(codes, torch.float32, backend="torch")
    for config in (Config(8, 32, 64), Config(32, 64, 0, stages=2), Config(4, 512, 512)):
        weight = torch.full_like(expected, torch.nan)
        launch(weight, codes, None, config)
        assert torch.equal(weight, expected), config


# Triton's interpreter cuts numbers to bfloat16 instead of rounding them
_INTERPRETED = """
import torch
from kernels.test_dequantize import CASES, WIDE, as_torch, codes_of, cut_otherwise, spans_as_torch
for codes in map(codes_of, CASES):
    as_torch(codes, [torch.float32, torch.float16])
for number in (1, 4, 7):
    cut_otherwise(codes_of(CASES[number]))
for case in (*WIDE, (99, 112, "rtn", 3, 16, "integer")):
    spans_as_torch(codes_of(case), [torch.float32, torch.float16])
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [*WIDE, (20001, 576, "rtn", 8, 64, "integer")])
def test_rows_on_a_gpu_are_torchs(case: Case) -> None:
    codes = codes_of(case, "cuda")
    spans_as_torch(codes, [*HALF, torch.float32])
    rows = torch.tensor([case[0] - 1, 0, 33], device="cuda")
    whole = dequantize(codes, torch.bfloat16)
    assert torch.equal(gather_rows(codes, rows, torch.bfloat16), whole[rows])
