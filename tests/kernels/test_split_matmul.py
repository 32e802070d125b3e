"""Products on the tensor cores: exact where there are none, near float32 where there are."""

from __future__ import annotations

import pytest
import torch

from qwha_cli.kernels.split_matmul import SplitMatrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_cpu_it_is_the_plain_product(dtype: torch.dtype) -> None:
    left, right = torch.randn(5, 33, dtype=dtype), torch.randn(33, 20, dtype=dtype)
    assert torch.equal(SplitMatrix(right).multiply(left), left @ right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(5, 33, 20), (300, 896, 896), (64, 4864, 4864)])
def test_on_a_gpu_the_error_is_that_of_sixteen_bits(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner), torch.randn(inner, columns) * torch.logspace(-3, 3, columns)
    exact = left.double() @ right.double()
    scale = left.double().abs() @ right.double().abs()
    product = SplitMatrix(right.cuda()).multiply(left.cuda()).cpu().double()
    assert float(((product - exact).abs() / scale).max()) < 2**-15
