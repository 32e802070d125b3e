"""Transforms written as 8-bit numbers in their own pass: by themselves, of norms and of gated activations; gradients."""

from __future__ import annotations

import pytest
import torch

from qwha_cli.errors import KernelError
from qwha_cli.kernels.fp8 import lacks_fp8
from qwha_cli.kernels.fused_wht import gate_wht, norm_wht
from qwha_cli.kernels.gradient_chain import in_parts, parts_of
from qwha_cli.kernels.shared_fp8 import shared_fp8
from qwha_cli.kernels.shared_wht import shared_wht, stand_in
from qwha_cli.kernels.stand_in import mark_stand_in, stands_in
from qwha_cli.kernels.wht_fp8 import wht_fp8
from support.triton import HAS_TRITON, run_interpreted

LACKING = lacks_fp8(torch.device("cuda")) if torch.cuda.is_available() else "no CUDA device"


def test_without_triton_the_transform_has_its_numbers_and_the_form_is_made_of_them() -> None:
    x = torch.randn(5, 48)
    z = wht_fp8(x)
    assert not stands_in(z)
    assert float((shared_fp8(z).dense(torch.float32) - z).norm() / z.norm()) < 0.04
    z, _ = norm_wht(x, torch.ones(48), eps=1e-5, dtype=torch.float32, fp8=True)
    assert torch.isfinite(z).all()
    assert torch.isfinite(gate_wht(x, x, dtype=torch.float32, fp8=True)).all()


def test_a_gradient_without_numbers_is_not_read_without_its_parts() -> None:
    x = torch.randn(5, 48)
    assert parts_of(x) == (x,)
    whole = in_parts((x, x + 1))
    assert len(parts_of(whole)) == 2
    lost = torch.full((5, 48), float("nan"))
    mark_stand_in(lost)
    with pytest.raises(KernelError, match="its parts were gone"):
        parts_of(lost)


def test_a_transform_without_numbers_is_not_read_for_its_numbers() -> None:
    x, z = torch.randn(5, 48), torch.full((5, 48), float("nan"))
    mark_stand_in(z)
    with pytest.raises(KernelError, match="8-bit form was gone"):
        shared_fp8(z)
    read = stand_in(z, torch.float32)
    assert shared_wht(read, fp8=True) is z
    with pytest.raises(KernelError, match="in another form"):
        shared_wht(read)
    # an input that exists is transformed again for those who want numbers, and these serve both
    again = shared_wht(x)
    assert shared_wht(x, fp8=True) is again


CODE = """
import torch
from qwha_cli.kernels.fused_wht import gate_wht, norm_wht
from qwha_cli.kernels.gradient_chain import in_parts
from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.shared_fp8 import shared_fp8
from qwha_cli.kernels.shared_wht import shared_wht
from qwha_cli.kernels.wht_fp8 import wht_fp8
size, device, near_share = {size}, "{device}", {near_share}
H = dense(size).to(device)
def numbers(seed):
    x = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    # rows of very different sizes, an outlier, and nothing at all
    x = x * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0], dtype=torch.float64).unsqueeze(1)
    x[3, 7] = 1000.0
    return x.to(device)
def error(found, exact): return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())
def check(z, exact):
    assert torch.isnan(z).all() and z.shape == exact.shape and z.dtype == torch.bfloat16
    form = shared_fp8(z)
    assert torch.equal(torch.frexp(form.scales)[0], torch.full_like(form.scales, 0.5))
    bound = exact.detach().norm(dim=1) / form.scales
    assert ((bound <= 450) & (bound > 220)).all(), bound
    for held, row, scale in zip(form.dense(torch.float64), exact.detach(), form.scales.double()):
        # sums of bfloat16 numbers, then three bits behind the point
        near = (held - row).abs() <= row.abs() / 15 + scale * 2.0**-10 + row.abs().mean() / 100
        assert near.double().mean() >= near_share, near.double().mean()
x, weight = numbers(0).bfloat16(), numbers(9)[1].bfloat16()
leaf = x.clone().requires_grad_()
z = wht_fp8(leaf * 1)
check(z, x.double() @ H)
dz = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).bfloat16().to(device)
z.backward(dz)
assert error(leaf.grad, dz.double() @ H.T) < 6e-3
with torch.no_grad():
    check(wht_fp8(x), x.double() @ H)
    # three readers of 8-bit numbers make one transform; one of others makes another
    first = shared_wht(x, fp8=True)
    assert shared_wht(x, fp8=True) is first
    assert error(shared_wht(x), x.double() @ H) < 6e-3
zeros = wht_fp8(torch.zeros(2, size, dtype=torch.bfloat16, device=device))
assert not shared_fp8(zeros).values.float().any()
for added in (False, True):
    a = numbers(1).bfloat16() if added else None
    leaves = [t.clone().requires_grad_() for t in ((x, a) if added else (x,))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    how = {{"eps": 1e-5, "dtype": torch.bfloat16, "fp8": True, "backend": "triton"}}
    z, h = norm_wht(leaves[0], weight, add=leaves[1] if added else None, **how)
    eh = sum(exact)
    ez = eh * torch.rsqrt(eh.square().mean(-1, keepdim=True) + 1e-5) * weight.double() @ H
    check(z, ez)
    dh = dz.flip(0)
    found = torch.autograd.grad((z, h), leaves, (dz, dh))
    wanted = torch.autograd.grad((ez, eh), exact, (dz.double(), dh.double()))
    assert all(error(one, two) < 8e-3 for one, two in zip(found, wanted)), [error(one, two) for one, two in zip(found, wanted)]
    # a gradient in parts, as several readers hand it on
    for count in (2, 3, 4):
        z, _ = norm_wht(leaves[0], weight, add=leaves[1] if added else None, **how)
        dzs = [torch.roll(dz, i, dims=1) for i in range(count)]
        ez = sum(exact)
        ez = ez * torch.rsqrt(ez.square().mean(-1, keepdim=True) + 1e-5) * weight.double() @ H
        found = torch.autograd.grad(z, leaves, in_parts(dzs))
        wanted = torch.autograd.grad(ez, exact, sum(part.double() for part in dzs))
        assert all(error(one, two) < 8e-3 for one, two in zip(found, wanted))
    ez = ez.detach()
    with torch.no_grad():
        again, _ = norm_wht(x, weight, add=a, **how)
        check(again, ez)
gate, up = (numbers(i).bfloat16().requires_grad_() for i in (4, 5))
eg, eu = (t.detach().double().requires_grad_() for t in (gate, up))
ez = torch.nn.functional.silu(eg) * eu @ H
with torch.no_grad():
    check(gate_wht(gate, up, dtype=torch.bfloat16, fp8=True, backend="triton"), ez)
z = gate_wht(gate, up, dtype=torch.bfloat16, fp8=True, backend="triton")
check(z, ez)
wanted = torch.autograd.grad(ez, (eg, eu), dz.double())
z.backward(dz)
assert all(error(one, two) < 8e-3 for one, two in zip((gate.grad, up.grad), wanted))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="no triton")
@pytest.mark.parametrize("size", [48, 576, 92 * 4, 3072])
def test_in_triton_scales_are_from_norms_and_gradients_as_without_rounding(size: int) -> None:
    run_interpreted(CODE.format(size=size, device="cpu", near_share=0.995))


@pytest.mark.gpu
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
@pytest.mark.parametrize("size", [896, 2048, 3072, 4096, 4864, 8192, 9728, 14336])
def test_on_a_gpu_rows_lose_what_the_format_loses(size: int) -> None:
    exec(CODE.format(size=size, device="cuda", near_share=0.998), {})


BLOCKS = """
import torch
from qwha_cli.adapters.fp8 import choose_fp8, fp8_products
from qwha_cli.adapters.fused_blocks import fused_blocks
from qwha_cli.adapters.keep import set_keep
from test_fused_blocks import adapted, run
from support.tiny_model import tiny_llama
from qwha_cli.kernels import fused_wht
seen = []
for name in ("norm_wht", "gate_wht"):
    def counted(*a, made=getattr(fused_wht, name), **k):
        seen.append(k["fp8"])
        return made(*a, **k)
    setattr(__import__("qwha_cli.adapters.fused_blocks", fromlist=["x"]), name, counted)
model = adapted(tiny_llama, num_key_value_heads=heads).to(torch.float32).train()
plain, gradients = run(model, dtype=torch.bfloat16)
def flat(tensors): return torch.cat([tensor.flatten() for tensor in tensors])
def error(a, b): return float((flat(a) - flat(b)).norm() / flat(b).norm())
with fp8_products(choose_fp8(model, wanted=True)):
    apart, ones = run(model, dtype=torch.bfloat16)
    assert 0.02 < error(ones, gradients) < 0.25, error(ones, gradients)
    with fused_blocks(model.get_base_model()):
        for keep, checkpointing in (("memory", False), ("speed", False), ("block", True)):
            set_keep(model, keep)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            seen.clear()
            fused, twos = run(model, dtype=torch.bfloat16)
            # with two heads for keys and values, these have sizes that tensor cores do not take
            assert seen[:3] == [heads == 4, True, True], seen
            assert abs(float(fused - plain)) < 0.03
            assert error(twos, gradients) < 1.3 * error(ones, gradients)
        with torch.no_grad():
            model.eval()
            # a few tokens are multiplied from the codes, and read numbers
            assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
"""


@pytest.mark.skipif(not HAS_TRITON, reason="no triton")
@pytest.mark.parametrize("heads", [2, 4])
def test_blocks_hand_8_bit_transforms_to_their_projections(heads: int) -> None:
    run_interpreted(f"import sys; sys.path.insert(0, 'tests/adapters')\nheads = {heads}\n" + BLOCKS)


@pytest.mark.skipif(not HAS_TRITON, reason="no triton")
def test_what_was_transformed_for_inference_is_transformed_anew_to_train() -> None:
    run_interpreted("""
import torch
from qwha_cli.kernels.shared_fp8 import shared_fp8
from qwha_cli.kernels.shared_wht import shared_wht
x = torch.randn(4, 48).bfloat16()
with torch.inference_mode():
    first = shared_wht(x, fp8=True)
again = shared_wht(x, fp8=True)
assert again is not first
assert not shared_fp8(again).values.is_inference()
""")
