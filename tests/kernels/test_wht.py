"""The transform against the dense matrix, its transpose, its gradient and its error in half precision."""

from __future__ import annotations

import pytest
import torch

from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.wht import _multiply, transform_gram, wht

# one of each kind: Sylvester, Paley I, Paley II, Paley II over GF(25), Williamson, Kronecker, blocks, odd
SIZES = [1, 2, 64, 256, 12, 48, 80, 320, 36, 576, 52, 416, 92, 736, 188, 66, 9, 1904]


@pytest.mark.parametrize("size", SIZES)
def test_the_transform_is_the_dense_product(size: int) -> None:
    x = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = dense(size)
    assert (wht(x) - x @ matrix).abs().max() < 1e-12
    assert (wht(x, transpose=True) - x @ matrix.T).abs().max() < 1e-12


@pytest.mark.parametrize("size", [4864, 11008, 14336, 18944, 29568, 53248])
def test_the_transpose_undoes_the_transform_and_keeps_the_norm(size: int) -> None:
    x = torch.randn(2, size, dtype=torch.float64)
    z = wht(x)
    assert (wht(z, transpose=True) - x).abs().max() < 1e-12
    assert torch.allclose(z.norm(dim=1), x.norm(dim=1), rtol=1e-12)
    assert (z - x).abs().max() > 0.5


@pytest.mark.parametrize("shape", [(48,), (2, 3, 48), (0, 48), (2, 1, 3, 576)])
def test_any_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    assert wht(x).shape == x.shape
    assert torch.allclose(wht(x), x @ dense(shape[-1]), atol=1e-12)


def test_a_strided_input_is_read_as_it_is() -> None:
    x = torch.randn(48, 7, dtype=torch.float64).T
    assert torch.allclose(wht(x), x @ dense(48), atol=1e-12)


@pytest.mark.parametrize("size", [16, 12, 36, 92, 80, 128 * 3, 66])
@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_hold_for_every_kind_of_base(size: int, transpose: bool) -> None:
    x = torch.randn(2, size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: wht(t, transpose=transpose), (x,), fast_mode=size > 40)


@pytest.mark.parametrize("size", [64, 256, 576, 1536, 416, 736])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 1000.0])
def test_half_precision_is_as_good_as_the_dense_product_in_that_dtype(size: int, dtype: torch.dtype, spread: float) -> None:
    x = (torch.randn(64, size, generator=torch.Generator().manual_seed(1)) * spread).to(dtype)
    exact = x.to(torch.float64) @ dense(size)
    same_dtype = (x @ dense(size, dtype=dtype)).to(torch.float64)
    reference = (same_dtype - exact).abs()
    # the second is what an accelerator computes
    for result in (wht(x), _multiply(x, False)):
        assert result.dtype == dtype
        error = (result.to(torch.float64) - exact).abs()
        assert error.max() <= 2 * reference.max() + 1e-6
        assert error.mean() <= 2 * reference.mean() + 1e-6


def test_float32_is_exact_to_rounding() -> None:
    x = torch.randn(16, 11008)
    assert (wht(x).double() - wht(x.double())).abs().max() < 1e-5


def test_the_same_call_gives_the_same_bits() -> None:
    x = torch.randn(16, 576)
    assert torch.equal(wht(x), wht(x.clone()))


@pytest.mark.parametrize("size", [48, 92, 66])
def test_the_gram_of_transformed_inputs_is_the_transformed_gram(size: int) -> None:
    x = torch.randn(100, size, dtype=torch.float64)
    transformed = transform_gram(x.T @ x)
    z = wht(x)
    assert torch.allclose(transformed, z.T @ z, atol=1e-10)
    assert torch.equal(transformed, transformed.T)


def test_factors_first_made_under_inference_mode_serve_training_later() -> None:
    with torch.inference_mode():
        wht(torch.randn(2, 448))
    x = torch.randn(2, 448, requires_grad=True)
    wht(x).square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x, atol=1e-5)
