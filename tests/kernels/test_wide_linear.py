"""A head in codes, in parts: the float64 product and its gradient, no less exact in half precision than with all of it dense."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwha_cli.kernels import wide_linear as wide
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize
from qwha_cli.kernels.wide_linear import is_wide, wide_gradient, wide_linear, wide_product
from support.codes import codes_of
from support.quantized import gaussian

CASE = (1003, 80, "rtn", 8, 16, "integer")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, cuda])]


@pytest.fixture(autouse=True)
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven parts, the last of another size."""
    monkeypatch.setattr(wide, "_AT_ONCE", 96)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_float64_reference_forward_and_backward(device: str, bias: bool) -> None:
    codes = codes_of(CASE, device)
    weight = dequantize(codes, torch.float64)
    x = gaussian(6, 80).double().view(2, 3, 80).to(device).requires_grad_()
    added = gaussian(1, 1003)[0].double().to(device) if bias else None
    exact = x.detach().clone().requires_grad_()
    found, expected = wide_linear(x, codes, bias=added), nn.functional.linear(exact, weight, added)
    slopes = torch.randn_like(expected)
    found.backward(slopes)
    expected.backward(slopes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, exact.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_are_no_less_exact_than_the_whole(device: str, dtype: torch.dtype) -> None:
    codes = codes_of(CASE, device)
    exact, whole = dequantize(codes, torch.float64), dequantize(codes, dtype)
    z, dy = (gaussian(40, size, seed=size).to(device, dtype) for size in (80, 1003))

    def errors(found: Tensor, torchs: Tensor, wanted: Tensor) -> tuple[float, float]:
        return float((found.double() - wanted).norm()), 2 * float((torchs.double() - wanted).norm()) + 1e-6 * float(wanted.norm())

    mine, most = errors(wide_product(z, codes), z @ whole.mT, z.double() @ exact.mT)
    assert mine <= most
    mine, most = errors(wide_gradient(dy, codes), dy @ whole, dy.double() @ exact)
    assert mine <= most
    assert wide_gradient(dy, codes).dtype == wide_product(z, codes).dtype == dtype


def test_no_tokens_are_no_rows() -> None:
    codes = codes_of(CASE)
    assert wide_linear(torch.zeros(2, 0, 80), codes, bias=None).shape == (2, 0, 1003)
    assert torch.equal(wide_gradient(torch.zeros(0, 1003), codes), torch.zeros(0, 80))


def test_heads_are_wide_and_layers_are_not() -> None:
    def words(count: int, layout: str = "gptq") -> Codes:
        nothing = torch.zeros(0)
        return Codes(nothing, nothing, nothing, layout, (count, 64), 8, 8, 64)  # pyright: ignore[reportArgumentType]

    assert is_wide(words(128_256))
    assert not is_wide(words(53_248)), "the widest layers of a 405B model"
    assert not is_wide(words(128_256, "nf4"))
    assert not is_wide(torch.zeros(128_256, 1))
