"""Norms and gated activations in one pass with the transform, against float64 and the dense matrix; gradients; in Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.fused_wht import choose_fused, gate_wht, norm_wht
from qwha_cli.kernels.hadamard import dense
from support.triton import HAS_TRITON, run_interpreted

EPS = 1e-5
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def numbers(rows: int, size: int, seed: int) -> Tensor:
    return torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * weight


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("size", [48, 64, 576, 92, 66])
def test_the_norm_is_that_of_the_row_and_then_transformed(size: int) -> None:
    x, add, weight = numbers(5, size, 0), numbers(5, size, 1), numbers(1, size, 2)[0]
    z, h = norm_wht(x, weight, eps=EPS, dtype=torch.float64, add=add)
    assert torch.allclose(h, x + add, atol=1e-14)
    assert torch.allclose(z, normed(x + add, weight) @ dense(size), atol=1e-12)
    z, h = norm_wht(x, weight, eps=EPS, dtype=torch.float64)
    assert h is x
    assert torch.allclose(z, normed(x, weight) @ dense(size), atol=1e-12)


@pytest.mark.parametrize("size", [48, 576, 66])
def test_the_gated_activation_is_transformed(size: int) -> None:
    gate, up = numbers(5, size, 0), numbers(5, size, 1)
    assert torch.allclose(gate_wht(gate, up, dtype=torch.float64), gated(gate, up) @ dense(size), atol=1e-12)


def test_gradients_hold() -> None:
    weight = numbers(1, 36, 2)[0]
    x, add, gate = (numbers(3, 36, seed).requires_grad_() for seed in (0, 1, 3))
    assert torch.autograd.gradcheck(lambda a, b: norm_wht(a, weight, eps=EPS, dtype=torch.float64, add=b), (x, add))
    assert torch.autograd.gradcheck(lambda a: norm_wht(a, weight, eps=EPS, dtype=torch.float64), (x,))
    assert torch.autograd.gradcheck(lambda a, b: gate_wht(a, b, dtype=torch.float64), (x, gate))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 48)
    for weight, add in ((torch.zeros(47), None), (torch.zeros(48), torch.zeros(2, 47)), (torch.zeros(48), x.double())):
        with pytest.raises(KernelError, match="48"):
            norm_wht(x, weight, eps=EPS, dtype=torch.float32, add=add)
    with pytest.raises(KernelError, match="up"):
        gate_wht(x, x.double(), dtype=torch.float32)
    with pytest.raises(KernelError, match="cannot run"):
        gate_wht(x, x, dtype=torch.bfloat16, backend="triton")


def test_blocks_and_other_dtypes_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwha_cli.kernels.backend._lacking", lambda *_: None)
    device = torch.device("cuda")
    assert choose_fused("auto", size=3072, dtype=torch.bfloat16, device=device).name == "triton"
    assert "float16" in choose_fused("auto", size=3072, dtype=torch.float16, device=device).reason
    assert "in blocks" in choose_fused("auto", size=66, dtype=torch.bfloat16, device=device).reason


CODE = """
import torch
from qwha_cli.kernels.fused_wht import norm_wht, gate_wht
from qwha_cli.kernels.hadamard import dense
size, kind = {size}, torch.{kind}
def numbers(seed): return torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
def error(found, exact): return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())
H = dense(size)
worst = []
weight = numbers(9)[0].to(kind)
for added in (False, True):
    for more in (False, True):
        x, add = numbers(0).to(kind).requires_grad_(), numbers(1).to(kind).requires_grad_() if added else None
        ex, ea = x.detach().double().requires_grad_(), add.detach().double().requires_grad_() if added else None
        z, h = norm_wht(x, weight, eps=1e-5, dtype=torch.bfloat16, add=add, backend="triton")
        eh = ex + ea if added else ex
        ez = eh * torch.rsqrt(eh.square().mean(-1, keepdim=True) + 1e-5) * weight.double() @ H
        assert z.dtype == torch.bfloat16 and h.dtype == kind and z.shape == x.shape
        dz, dh = numbers(2).bfloat16(), numbers(3).to(kind)
        outs, grads = ((z, h), (dz, dh)) if more else ((z,), (dz,))
        inputs = [x, add] if added else [x]
        found = torch.autograd.grad(outs, inputs, grads)
        exact = torch.autograd.grad((ez, eh)[:len(outs)], [ex, ea] if added else [ex], tuple(g.double() for g in grads))
        worst += [error(z, ez), *(error(a, b) for a, b in zip(found, exact))]
        with torch.no_grad():
            again, _ = norm_wht(x, weight, eps=1e-5, dtype=torch.bfloat16, add=add, backend="triton")
        assert torch.equal(again, z)
gate, up = numbers(4).to(kind).requires_grad_(), numbers(5).to(kind).requires_grad_()
eg, eu = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
z = gate_wht(gate, up, dtype=torch.bfloat16, backend="triton")
ez = torch.nn.functional.silu(eg) * eu @ H
dz = numbers(6).bfloat16()
exact = torch.autograd.grad(ez, [eg, eu], dz.double())
z.backward(dz, retain_graph=True)
worst += [error(z, ez), *(error(a, b) for a, b in zip((gate.grad, up.grad), exact))]
try:
    z.backward(dz)
except RuntimeError as problem:
    assert "modified by an inplace operation" in str(problem), problem
else:
    raise AssertionError("a second backward pass was let through")
from torch.utils.checkpoint import checkpoint
def block(x, gate, up):
    z, h = norm_wht(x * 1, weight, eps=1e-5, dtype=torch.bfloat16, backend="triton")
    return gate_wht(gate * 1, up * 1, dtype=torch.bfloat16, backend="triton") + z + h
leaves = [numbers(i).to(kind).requires_grad_() for i in (0, 4, 5)]
plain = torch.autograd.grad(block(*leaves), leaves, dz.to(kind))
again = torch.autograd.grad(checkpoint(block, *leaves, use_reentrant=False), leaves, dz.to(kind))
assert all(torch.equal(a, b) for a, b in zip(plain, again))
print(max(worst))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="no triton")
@pytest.mark.parametrize("size", [48, 576, 92 * 4, 3072])
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_triton_gives_values_and_gradients_to_half_precision(size: int, kind: str) -> None:
    assert float(run_interpreted(CODE.format(size=size, kind=kind))) < 6e-3


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("size", [896, 2048, 3072, 4096, 4864, 8192, 9728, 14336])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_on_a_gpu_errors_are_those_of_the_same_steps_one_by_one(size: int, kind: torch.dtype) -> None:
    inputs = [numbers(300, size, seed).to("cuda", kind) for seed in range(4)]
    weight = numbers(1, size, 9)[0].to("cuda", kind)

    def results(dtype: torch.dtype, backend: str, exact: bool) -> list[Tensor]:
        x, add, gate, up = (t.to(torch.float64 if exact else kind).clone().requires_grad_() for t in inputs)
        z, h = norm_wht(x, weight.to(x.dtype), eps=EPS, dtype=dtype, add=add, backend=backend)
        g = gate_wht(gate, up, dtype=dtype, backend=backend)
        dz = inputs[1].to(torch.bfloat16).to(dtype)
        grads = torch.autograd.grad((z, h, g), (x, gate, up), (dz, inputs[2].to(h.dtype), dz))
        return [t.detach().double() for t in (z, h, g, *grads)]

    exact = results(torch.float64, "torch", True)
    apart, fused = results(torch.bfloat16, "torch", False), results(torch.bfloat16, "triton", False)
    for true, one, two in zip(exact, apart, fused, strict=True):
        assert (two - true).norm() <= 1.2 * (one - true).norm() + 1e-6 * true.norm()
