"""8-bit matrices: rounded once, transposed without rounding again, multiplied, and a layer's three products of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwha_cli.errors import KernelError
from qwha_cli.kernels import fp8, fp8_products
from qwha_cli.kernels import shared_fp8 as shared_fp8_module
from qwha_cli.kernels.fp8 import Fp8Matrix, both_ways, filled, lacks_fp8, matmul_fp8, to_fp8, transposed, turned
from qwha_cli.kernels.fp8_products import fp8_gradients
from qwha_cli.kernels.gradient_chain import mark_ours
from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.shared_fp8 import shared_fp8
from qwha_cli.kernels.spectral_linear import spectral_linear
from qwha_cli.kernels.weight_fp8 import Fp8Weight, both_forms
from support.codes import random_places
from support.triton import HAS_TRITON, run_interpreted

LACKING = lacks_fp8(torch.device("cuda")) if torch.cuda.is_available() else "no CUDA device"
SHAPES = [(1, 16), (37, 48), (64, 896), (5, 3072)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(*shape: int) -> Tensor:
    """Rows of very different sizes, one of them of zeros."""
    x = gaussian(*shape) * torch.logspace(-15, 12, shape[0]).unsqueeze(1)
    x[shape[0] // 2] = 0
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_entry_is_rounded_to_the_nearest_number_of_its_rows_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = spread(*shape).to(dtype)
    a = to_fp8(x)
    assert a.values.dtype == torch.float8_e4m3fn
    exact = x.double()
    mantissas, _ = torch.frexp(a.scales)
    assert (mantissas == 0.5).all(), "scales are powers of two"
    largest = exact.abs().amax(dim=1) / a.scales
    assert (largest <= 448).all()
    # and no larger than they need be, but for rows of nothing
    assert ((largest > 224) | (largest == 0)).all()
    off = (a.dense(torch.float64) - exact).abs()
    # a sixteenth of itself, or half of the smallest step below 2^-6
    assert (off <= torch.maximum(exact.abs() / 16, a.scales.double().unsqueeze(1) * 2.0**-10)).all()


def test_gaussian_rows_lose_what_the_page_says() -> None:
    x = gaussian(256, 3072)
    error = (to_fp8(x).dense(torch.float32) - x).norm() / x.norm()
    assert 0.024 < float(error) < 0.028


def test_what_is_not_finite_does_not_become_finite() -> None:
    x = gaussian(3, 32)
    x[0, 3], x[2, 5] = float("nan"), float("inf")
    y = matmul_fp8(to_fp8(x), to_fp8(gaussian(16, 32, seed=1)), torch.float32)
    assert not torch.isfinite(y[0]).any()
    assert torch.isfinite(y[1]).all()
    assert not torch.isfinite(y[2]).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_transposing_rounds_nothing_within_two_to_the_eight(shape: tuple[int, int]) -> None:
    x = gaussian(*shape) * torch.logspace(-4, 4, shape[0], base=2).unsqueeze(1)
    a = to_fp8(x)
    b = transposed(a)
    padded = -(-shape[0] // 16) * 16
    assert b.values.shape == (shape[1], padded)
    assert b.values.is_contiguous()
    assert len(b.scales.unique()) == 1
    whole, turned = a.dense(torch.float64), b.dense(torch.float64)
    assert not turned[:, shape[0] :].any()
    # what falls into the subnormal numbers loses at most half of their step
    assert ((turned[:, : shape[0]].T - whole).abs() <= b.scales[0].double() * 2.0**-10).all()
    kept = whole.abs() >= b.scales[0].double() * 2.0**-6
    assert torch.equal(turned[:, : shape[0]].T[kept], whole[kept])


@pytest.mark.parametrize(("rows", "wanted"), [(1, 16), (37, 48), (48, 48)])
def test_rows_are_filled_up_with_zeros(rows: int, wanted: int) -> None:
    a = to_fp8(gaussian(rows, 32))
    b = filled(a)
    assert b.values.shape == (wanted, 32)
    assert b.scales.shape == (wanted,)
    assert torch.equal(b.dense(torch.float32)[:rows], a.dense(torch.float32))
    assert not b.dense(torch.float32)[rows:].any()


def test_turned_numbers_are_those_that_lay_there() -> None:
    a = to_fp8(gaussian(37, 48))
    b = turned(a)
    assert b.values.shape == (48, 48)
    assert torch.equal(b.values[:, :37].T.float(), a.values.float())
    assert not b.values[:, 37:].float().any()
    assert torch.equal(b.scales, torch.ones(48))


def test_tokens_that_are_large_on_one_side_alone_cost_the_others_nothing() -> None:
    z, dy = gaussian(64, 48), gaussian(64, 32, seed=1)
    exact = dy.double().T @ z.double()
    # a token of massive activations, which nothing depends on: as in the inputs of feed-forward layers
    z[3], dy[3] = z[3] * 2.0**20, dy[3] * 2.0**-20
    error = (held_sum(dy, z) - exact).norm() / exact.norm()
    assert float(error) < 0.05
    apart = held_turned(dy).T @ held_turned(z)
    assert float((apart - exact).norm() / exact.norm()) > 0.5


def test_a_product_is_that_of_the_numbers_held() -> None:
    a, b = to_fp8(gaussian(37, 48)), to_fp8(gaussian(32, 48, seed=1))
    expected = a.dense(torch.float64) @ b.dense(torch.float64).T
    torch.testing.assert_close(matmul_fp8(a, b, torch.float32).double(), expected, rtol=1e-5, atol=1e-4)


def test_sizes_and_dtypes_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="multiples of 16"):
        matmul_fp8(to_fp8(gaussian(4, 24)), to_fp8(gaussian(16, 24)), torch.float32)
    with pytest.raises(KernelError, match="multiples of 16"):
        matmul_fp8(to_fp8(gaussian(4, 32)), to_fp8(gaussian(10, 32)), torch.float32)
    for turn in (transposed, turned):
        with pytest.raises(KernelError, match=r"multiple of 16, not \(4, 24\)"):
            turn(to_fp8(gaussian(4, 24)))
    with pytest.raises(KernelError, match="float64"):
        to_fp8(gaussian(4, 16).double())
    assert lacks_fp8(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    assert "Some Card" in str(lacks_fp8(torch.device("cuda", 0)))


def test_a_torch_without_such_products_for_a_gpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise NotImplementedError("rowwise scaling is for other cards\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    monkeypatch.setattr(fp8, "to_fp8", lambda *_, **__: None)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(fp8, "matmul_fp8", lambda *_, **__: None)
    assert lacks_fp8(torch.device("cuda", 0)) is None
    monkeypatch.setattr(fp8, "matmul_fp8", refuse)
    assert "on Some Card (rowwise scaling is for other cards)" in str(lacks_fp8(torch.device("cuda", 0)))


# ---- a layer

IN, OUTS, SCALE = 48, (32, 64, 16), 0.75


class Reader:
    """A layer of dense base, in the Hadamard basis."""

    def __init__(self, out: int, *, seed: int, size: int = IN) -> None:
        self.base = gaussian(out, size, seed=seed)
        self.places: Places = random_places((out, size), density=0.2)
        self.values = gaussian(len(self.places), seed=seed + 50).requires_grad_()
        self.bias = gaussian(out, seed=seed + 70).requires_grad_()

    def __call__(self, x: Tensor, **how: object) -> Tensor:
        rest = {"base": self.base, "places": self.places, "basis": "hadamard", "scale": SCALE, "bias": self.bias}
        return spectral_linear(x, self.values, **rest, **{"fp8": True, **how})  # pyright: ignore

    def weight(self) -> Tensor:
        spectrum = torch.zeros(self.base.numel())
        return self.base + spectrum.index_add(0, self.places.flat_index.long(), self.values.detach() * SCALE).view(
            self.base.shape
        )

    def both(self) -> Fp8Weight:
        return both_forms(self.base, self.values.detach(), self.places, scale=SCALE)

    def held(self) -> Tensor:
        both = self.both()
        return Fp8Matrix(both.values, both.scales).dense(torch.float64)

    def held_turned(self) -> Tensor:
        both = self.both()
        return Fp8Matrix(both.turned, both.turned_scales).dense(torch.float64).T


def held(x: Tensor) -> Tensor:
    return to_fp8(x).dense(torch.float64)


def held_turned(x: Tensor) -> Tensor:
    return transposed(to_fp8(x)).dense(torch.float64)[:, : len(x)].T


def held_sum(dy: Tensor, z: Tensor) -> Tensor:
    """The sum over tokens of products of rows, with the scales of z at dy."""
    form = to_fp8(z)
    left = transposed(to_fp8(dy), by=form.scales).dense(torch.float64)
    return left @ turned(form).dense(torch.float64).T


@pytest.mark.parametrize("keep", ["memory", "block", "speed"])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("tokens", [(2, 24), (19,)])
def test_layers_with_one_input_have_the_gradients_of_the_numbers_held(
    keep: str, recomputed: bool, tokens: tuple[int, ...]
) -> None:
    readers = [Reader(out, seed=seed) for seed, out in enumerate(OUTS)]
    leaf = gaussian(*tokens, IN, seed=9).requires_grad_()
    hows: list[dict[str, object]] = [
        {"until_backward": keep == "block", "fp8": reader.both() if keep == "speed" else True} for reader in readers
    ]

    def block(x: Tensor) -> Tensor:
        x = x * 1.0
        return torch.cat([reader(x, **how) for reader, how in zip(readers, hows, strict=True)], dim=-1)

    y = checkpoint(block, leaf, use_reentrant=False) if recomputed else block(leaf)
    assert isinstance(y, Tensor)
    z = (leaf.detach().double() @ dense(IN)).float().reshape(-1, IN)
    expected = torch.cat([held(z) @ r.held().T + r.bias.detach().double() for r in readers], dim=1)
    torch.testing.assert_close(y.detach().double().reshape(-1, sum(OUTS)), expected, rtol=0, atol=2e-4)
    dy = gaussian(*tokens, sum(OUTS), seed=11)
    y.backward(dy)
    parts = dy.reshape(-1, sum(OUTS)).split(OUTS, dim=1)
    dz = sum(held(part) @ r.held_turned() for part, r in zip(parts, readers, strict=True))
    assert isinstance(dz, Tensor)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double().reshape(-1, IN), dz @ dense(IN).T, rtol=0, atol=1e-3)
    for part, reader in zip(parts, readers, strict=True):
        full = held_sum(part, z) * SCALE
        found = reader.values.grad
        assert found is not None
        torch.testing.assert_close(found.double(), full.reshape(-1)[reader.places.flat_index.long()], rtol=0, atol=1e-3)
        torch.testing.assert_close(reader.bias.grad, part.sum(dim=0))


def test_the_gradients_are_within_fp8s_error_of_the_exact_ones() -> None:
    reader, x = Reader(512, seed=3, size=768), gaussian(2048, 768, seed=4).requires_grad_()
    reader(x).square().sum().backward()
    z = x.detach().double() @ dense(768)
    y = z @ reader.weight().double().T + reader.bias.detach().double()
    dz, full = 2 * y @ reader.weight().double(), 2 * y.T @ z * SCALE
    exact = full.reshape(-1)[reader.places.flat_index.long()]
    assert x.grad is not None
    assert reader.values.grad is not None
    for found, wanted in ((x.grad.double(), dz @ dense(768).T), (reader.values.grad.double(), exact)):
        assert float((found - wanted).norm() / wanted.norm()) < 0.08


def test_z_is_rounded_once_and_turned_once_for_all_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: list[tuple[int, ...]] = []
    swapped: list[tuple[int, ...]] = []

    def counting(function: Callable[..., Fp8Matrix], seen: list[tuple[int, ...]]) -> Callable[..., Fp8Matrix]:
        def counted(x: Tensor | Fp8Matrix, **how: object) -> Fp8Matrix:
            seen.append(tuple((x if isinstance(x, Tensor) else x.values).shape))
            return function(x, **how)

        return counted

    for module in (fp8, shared_fp8_module):
        monkeypatch.setattr(module, "to_fp8", counting(to_fp8, rounded))
    monkeypatch.setattr(fp8, "transposed", counting(transposed, swapped))
    monkeypatch.setattr(fp8_products, "turned", counting(turned, swapped))
    readers = [Reader(out, seed=seed) for seed, out in enumerate(OUTS)]
    x = gaussian(20, IN).requires_grad_() * 1.0
    sum(reader(x).square().sum() for reader in readers).backward()  # pyright: ignore
    # z, and a gradient for each layer
    assert rounded.count((20, IN)) == 1
    assert len(rounded) == 1 + len(OUTS)
    assert swapped.count((20, IN)) == 1
    assert len(swapped) == 1 + len(OUTS)


def test_z_written_to_is_rounded_again() -> None:
    z = gaussian(4, 48)
    first = shared_fp8(z, backend="auto")
    assert shared_fp8(z, backend="auto") is first
    z.mul_(3)
    again = shared_fp8(z, backend="auto")
    assert torch.equal(again.values.float(), to_fp8(z).values.float())
    assert again is not first


def test_a_gradient_that_somebody_else_can_see_is_not_written_over() -> None:
    reader = Reader(32, seed=1)
    z = to_fp8(gaussian(20, IN))
    both = reader.both()
    w = Fp8Matrix(both.turned, both.turned_scales)
    how = {"dtype": torch.float32, "wanted": False, "backend": "auto"}
    passed, dy = gaussian(20, IN, seed=7), gaussian(20, 32, seed=8)
    before = passed.clone()
    dz, _ = fp8_gradients(dy, passed, z, w, **how)  # pyright: ignore
    assert dz is not None
    assert torch.equal(passed, before)
    mark_ours(passed)
    again, _ = fp8_gradients(dy, passed, z, w, **how)  # pyright: ignore
    assert again is passed
    torch.testing.assert_close(dz, passed, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("until_backward", [False, True])
def test_of_a_weight_its_largest_scale_is_saved_and_nothing_else(until_backward: bool) -> None:
    reader, saved = Reader(32, seed=1), []

    def seen(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        reader(gaussian(20, IN).requires_grad_() * 1.0, until_backward=until_backward)
    others = [tensor for tensor in saved if tensor is not reader.base and tensor is not reader.values]
    # z in 8 bits, its tokens' scales, and that one
    assert sorted(tensor.numel() for tensor in others) == [1, 20, 20 * IN]


def test_an_input_without_gradient_costs_no_product_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, x = Reader(32, seed=1), gaussian(20, IN)
    products: list[int] = []
    monkeypatch.setattr(fp8_products, "matmul_fp8", lambda *a, **k: products.append(1) or matmul_fp8(*a, **k))
    spectral_linear(
        x,
        reader.values,
        base=reader.base,
        places=reader.places,
        basis="hadamard",
        scale=SCALE,
        bias=None,
        fp8=reader.both(),
    ).sum().backward()
    assert len(products) == 2


@pytest.mark.parametrize(("shape", "dtype"), [((0, IN), torch.float32), ((3, IN), torch.float64)])
def test_what_8_bit_products_do_not_take_is_multiplied_as_it_is(shape: tuple[int, int], dtype: torch.dtype) -> None:
    reader, x = Reader(32, seed=1), gaussian(*shape).to(dtype)
    z = x.double() @ dense(IN)
    expected = z @ reader.weight().double().T + reader.bias.detach().double()
    torch.testing.assert_close(reader(x).detach().double(), expected, rtol=0, atol=1e-4)


def test_either_of_inputs_and_values_may_be_without_gradient() -> None:
    reader, x = Reader(32, seed=1), gaussian(20, IN)
    reader(x).sum().backward()
    assert reader.values.grad is not None
    reader.values = reader.values.detach()
    wanted = x.clone().requires_grad_()
    reader(wanted).sum().backward()
    assert wanted.grad is not None
    with torch.no_grad():
        assert reader(x).shape == (20, 32)


def test_the_weight_basis_has_none_and_odd_sizes_are_multiplied_as_they_are() -> None:
    reader = Reader(32, seed=1)
    with pytest.raises(KernelError, match="8-bit products are of transforms"):
        spectral_linear(
            gaussian(4, IN),
            reader.values,
            base=reader.base,
            places=reader.places,
            basis="weight",
            scale=1.0,
            bias=None,
            fp8=True,
        )
    odd, x = Reader(40, seed=2), gaussian(8, IN)
    z = x.double() @ dense(IN)
    expected = z @ odd.weight().double().T + odd.bias.detach().double()
    torch.testing.assert_close(odd(x).detach().double(), expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_triton_finds_the_same_scales_and_moves_the_same_numbers() -> None:
    # of numbers that e4m3 holds: where it rounds, Triton's interpreter cuts off, or loses a carry
    code = """
import torch
from qwha_cli.kernels.fp8 import both_ways, to_fp8, transposed, turned
for rows, columns in ((1, 16), (37, 48), (70, 896)):
    x = torch.randint(-448, 448, (rows, columns)).float().to(torch.float8_e4m3fn).float()
    x = x * torch.logspace(-9, 9, rows, base=2).log2().round().exp2().unsqueeze(1)
    x[rows // 2] = 0
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (to_fp8(x.to(dtype), backend=name) for name in ("torch", "triton"))
        assert torch.equal(a.scales, b.scales)
        assert torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8))
        assert torch.equal(a.dense(torch.float32), x)
        at, bt = (transposed(a, backend=name) for name in ("torch", "triton"))
        assert torch.equal(at.scales, bt.scales)
        kept = at.values.float().abs() > 2.0**-6
        assert torch.equal(at.values.float()[kept], bt.values.float()[kept])
        by = torch.full((rows,), 0.5)
        (_, at), (b, bt) = (both_ways(x.to(dtype), by=by, backend=name) for name in ("torch", "triton"))
        assert torch.equal(a.scales, b.scales)
        assert torch.equal(at.scales, bt.scales)
        kept = at.values.float().abs() > 2.0**-6
        assert torch.equal(at.values.float()[kept], bt.values.float()[kept])
        at, bt = (turned(a, backend=name) for name in ("torch", "triton"))
        assert torch.equal(at.scales, bt.scales)
        assert torch.equal(at.values.view(torch.uint8), bt.values.view(torch.uint8))
"""
    run_interpreted(code)


@pytest.mark.gpu
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
@pytest.mark.parametrize("shape", [*SHAPES, (2048, 14336)])
def test_on_a_gpu_the_numbers_are_those_of_torch(shape: tuple[int, int]) -> None:
    x = spread(*shape).bfloat16().cuda()
    a, b = to_fp8(x, backend="torch"), to_fp8(x, backend="triton")
    assert torch.equal(a.scales, b.scales)
    assert torch.equal(a.values.float(), b.values.float())
    at, bt = transposed(a, backend="torch"), transposed(a, backend="triton")
    assert torch.equal(at.scales, bt.scales)
    assert torch.equal(at.values.float(), bt.values.float())
    by = (2.0 ** torch.arange(shape[0]).remainder(7)).cuda()
    (_, at), (b, bt) = both_ways(x, by=by, backend="torch"), both_ways(x, by=by, backend="triton")
    assert torch.equal(a.values.float(), b.values.float())
    assert torch.equal(at.scales, bt.scales)
    assert torch.equal(at.values.float(), bt.values.float())
    at, bt = turned(a, backend="torch"), turned(a, backend="triton")
    assert torch.equal(at.scales, bt.scales)
    assert torch.equal(at.values.float(), bt.values.float())


@pytest.mark.gpu
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
@pytest.mark.parametrize("shape", [(2048, 3072, 8192), (2000, 1024, 3072), (3072, 896, 8192), (4864, 896, 2048)])
def test_on_a_gpu_products_are_those_of_the_numbers_held(shape: tuple[int, int, int]) -> None:
    rows, columns, count = shape
    a, b = (to_fp8(gaussian(size, count, seed=size).cuda().bfloat16()) for size in (rows, columns))
    found = matmul_fp8(a, b, torch.bfloat16).float()
    expected = (a.values.float() * a.scales.unsqueeze(1)) @ (b.values.float() * b.scales.unsqueeze(1)).T
    error = float((found - expected).norm() / expected.norm())
    # bfloat16's rounding is 0.0017, what sums of 14 bits lose 0.002
    assert error < 0.003, error


@pytest.mark.gpu
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
@pytest.mark.parametrize("keep", ["memory", "block"])
def test_on_a_gpu_a_layer_is_as_far_from_the_exact_one_as_the_reference(keep: str) -> None:
    # no multiple of 16: the products' operands are filled up
    reader, x = Reader(512, seed=3, size=768), gaussian(2043, 768, seed=4)
    found: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        other = Reader(512, seed=3, size=768)
        flat = reader.places.flat_index.to(device)
        other.base, other.places = reader.base.to(device), Places.from_flat(flat, shape=reader.places.shape)
        other.values = reader.values.detach().to(device).requires_grad_()
        other.bias = reader.bias.detach().to(device).requires_grad_()
        leaf = x.to(device).bfloat16().requires_grad_()
        y = other(leaf * 1, until_backward=keep == "block")
        y.backward(gaussian(2043, 512, seed=5).to(device).to(y.dtype))
        assert leaf.grad is not None
        assert other.values.grad is not None
        found.append([t.detach().double().cpu() for t in (y, leaf.grad, other.values.grad)])
    for cpu, cuda in zip(*found, strict=True):
        assert float((cuda - cpu).norm() / cpu.norm()) < 0.02
