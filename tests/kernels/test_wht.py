"""The transform against the dense matrix, its transpose, its gradient, its error in half precision; the same in Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.wht import _multiply, choose_transform, transform_gram, wht
from qwha_cli.kernels.wht_tiles import Tiles, tiles_for, unfit
from support.triton import HAS_TRITON, run_interpreted

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
    add = torch.randn(2, size, dtype=torch.float64, requires_grad=True)
    for inputs in ((x, add), (x.detach(), add), (x, add.detach())):
        assert torch.autograd.gradcheck(lambda t, a: wht(t, transpose=transpose, add=a), inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda t, a: wht(t, transpose=transpose, add=a), inputs, fast_mode=True)


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


def test_nothing_is_kept_for_the_backward_pass() -> None:
    x, add = (torch.randn(4, 96, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = wht(x, add=add)
    assert result.requires_grad
    assert not kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_added_is_rounded_once_with_the_result(dtype: torch.dtype) -> None:
    x, add = (torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    exact = x.double() @ dense(96) + add.double()
    assert (wht(x, add=add).double() - exact).abs().max() <= (exact.to(dtype).double() - exact).abs().max() + 1e-6


def test_autocast_changes_nothing() -> None:
    x = torch.randn(4, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wht(x), wht(x.clone()))
        inside = wht(x)
    assert torch.equal(inside, wht(x))


def test_a_tensor_without_numbers_keeps_its_shape() -> None:
    assert wht(torch.empty(4, 96, device="meta", dtype=torch.bfloat16)).shape == (4, 96)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 96)
    for add in (torch.randn(96), torch.randn(4, 96, dtype=torch.float64), torch.empty(4, 96, device="meta")):
        with pytest.raises(KernelError, match="what is added must be as x"):
            wht(x, add=add)
    with pytest.raises(KernelError, match=r"the Triton kernel cannot run: .* not on cpu"):
        wht(x, backend="triton")


def test_what_the_kernel_does_not_take_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = [
        unfit(4096, torch.float64),
        unfit(9, torch.bfloat16),
        unfit(29568, torch.bfloat16),
        unfit(53248, torch.bfloat16),
        unfit(4096, torch.float32),
    ]
    wanted = ["no torch.float64", "changes nothing", "base of order 924", "57344 registers", "no torch.float32"]
    assert all(part in (reason or "") for part, reason in zip(wanted, reasons, strict=True))
    for size in (2, 16, 48, 2048, 3072, 4096, 5120, 8192, 11008, 14336, 16384, 18944, 28672):
        assert unfit(size, torch.bfloat16) is None
        assert tiles_for(size).block == size
    # the choice looks at the interpreter's switch each time
    cpu = torch.device("cpu")
    assert "not on cpu" in choose_transform("auto", size=96, dtype=torch.bfloat16, device=cpu).reason
    if HAS_TRITON:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert choose_transform("auto", size=96, dtype=torch.bfloat16, device=cpu).name == "triton"
        assert "924" in choose_transform("auto", size=29568, dtype=torch.bfloat16, device=cpu).reason
        with pytest.raises(KernelError, match="base of order 924"):
            choose_transform("triton", size=29568, dtype=torch.bfloat16, device=cpu)


# sums over both ways, one chunk and several, padded and not, blocks, no outer matrix
FAST = [2, 12, 16, 48, 66, 80, 96, 128, 576, 896, 1184, 3072]
# cuts that no size has by itself: butterflies of all lanes, tiles, programs that take several groups of rows
CUTS = [
    Tiles(12, 1, 256, 16, "exchange", rows=2),
    Tiles(1, 4, 256, 1, "exchange", rows=4),
    Tiles(12, 1, 256, 16, "warp", rows=2),
    Tiles(1, 4, 256, 1, "warp", rows=4),
    Tiles(20, 2, 256, 32, "warp", programs=2),
    Tiles(12, 4, 16, 16, "dot", rows=2, programs=2),
    Tiles(48, 2, 16, 16, "dot", rows=1, programs=3, stages=2),
]


def as_dense(size: int, dtype: torch.dtype, device: str, *, rounding: float = 0.0) -> None:
    """Triton's form in both directions, with and without an addend, of strided rows, against float64; its gradients."""
    generator = torch.Generator().manual_seed(size)
    both = (torch.randn(2, size, 5, generator=generator) * 3).to(device, dtype)
    x, add = both.mT.unbind(0)
    for transpose in (False, True):
        matrix = dense(size, device=device)
        matrix = matrix.T if transpose else matrix
        for other in (None, add):
            exact = x.double() @ matrix + (0 if other is None else other.double())
            found = wht(x, transpose=transpose, add=other, backend="triton")
            assert found.dtype == dtype
            within(found, wht(x, transpose=transpose, add=other, backend="torch"), exact, rounding)
        leaf, addend = x.clone().requires_grad_(), add.clone().requires_grad_()
        wht(leaf, transpose=transpose, add=addend, backend="triton").backward(add)
        assert leaf.grad is not None
        assert addend.grad is not None
        within(leaf.grad, wht(add, transpose=not transpose, backend="torch"), add.double() @ matrix.T, rounding)
        assert torch.equal(addend.grad, add)
    assert wht(x[:0], backend="triton").shape == (0, size)


def within(found: Tensor, same_dtype: Tensor, exact: Tensor, rounding: float) -> None:
    """At most twice the error of torch's form in that dtype, or of rounding the exact result, and `rounding` of the largest."""
    reference = torch.maximum((same_dtype.double() - exact).abs().max(), (exact.to(found.dtype).double() - exact).abs().max())
    allowed = 2 * reference + rounding * exact.abs().max() + 1e-6
    error = (found.double() - exact).abs().max()
    assert error <= allowed, f"{tuple(found.shape)} {found.dtype}: {error:.2e}, allowed {allowed:.2e}"


def cuts_agree(device: str, dtype: torch.dtype) -> None:
    from qwha_cli.kernels import wht_triton

    for cut in CUTS:
        x, add = torch.randn(2, 7, cut.block, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        for transpose in (False, True):
            found = wht_triton.wht(x, add, transpose=transpose, tiles=cut)
            exact = wht(x.double(), transpose=transpose, add=add.double(), backend="torch")
            within(found, wht(x, transpose=transpose, add=add, backend="torch"), exact, 0.0)


_INTERPRETED = """
import torch
from kernels.test_wht import FAST, as_dense, cuts_agree
for size in FAST:
    # the interpreter cuts the digits of bfloat16 off where the card rounds
    as_dense(size, torch.bfloat16, "cpu", rounding=2**-7)
    if size < 1000:
        as_dense(size, torch.float16, "cpu")
cuts_agree("cpu", torch.float16)
print("interpreted", len(FAST))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_interpreted_is_the_dense_product() -> None:
    assert run_interpreted(_INTERPRETED) == f"interpreted {len(FAST)}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_on_a_gpu_is_the_dense_product(dtype: torch.dtype) -> None:
    for size in (*FAST, 2048, 4096, 5120, 8192, 11008, 14336):
        as_dense(size, dtype, "cuda")
    cuts_agree("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_gives_the_same_bits_each_time_and_whatever_rows_come_along() -> None:
    x = torch.randn(300, 3072, device="cuda").bfloat16()
    assert torch.equal(wht(x), wht(x))
    assert torch.equal(wht(x)[:7], wht(x[:7]))
