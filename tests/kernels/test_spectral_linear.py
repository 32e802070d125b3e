"""The adapted layer: exact output and gradients in both bases, under autocast, checkpointing and every choice of what to keep."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from qwha_cli.errors import KernelError
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.effective_weight import build_weight, effective_weight, gather_entries
from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.spectral_linear import spectral_linear
from qwha_cli.kernels.wht import wht
from support.codes import random_places
from support.quantized import gaussian, options, run_quantizer

OUT, IN = 10, 12
PLACES = Places.from_flat(torch.tensor([0, 5, 17, 18, 60, 119], dtype=torch.int32), shape=(OUT, IN))
BASES = ["weight", "hadamard"]
# a dense tensor, or codes
KINDS = ["dense", "codes"]


class Layer:
    """A base, and the reference y = x W'ᵀ + b by dense float64 matrices."""

    def __init__(
        self, out_features: int = OUT, in_features: int = IN, *, dtype: torch.dtype = torch.float64, kind: str = "dense"
    ) -> None:
        self.weight = torch.randn(out_features, in_features, dtype=dtype, generator=torch.Generator().manual_seed(7))
        self.base: Codes | torch.Tensor = self.weight
        if kind == "codes":
            packed = run_quantizer(self.weight.float(), None, options("rtn", 3, in_features // 3))
            self.base, self.weight = packed.as_codes(), packed.dequantize(dtype)

    def merged(self, values: torch.Tensor, places: Places, *, basis: str, scale: float) -> torch.Tensor:
        spectrum = places.with_values(values.double() * scale).dense()
        matrix = dense(self.weight.shape[1])
        base = self.weight.double()
        return (base + spectrum) @ matrix.T if basis == "hadamard" else base + spectrum @ matrix.T


def kept(keep: str, layer: Layer, values: torch.Tensor, basis: str) -> torch.Tensor | None:
    """What a caller hands in who keeps the weight."""
    if keep != "speed":
        return None
    return effective_weight(layer.base, values.detach(), PLACES, basis=basis, scale=0.7, dtype=torch.float64)


def inputs(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_(grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN), (0, IN)])
def test_the_output_is_that_of_the_merged_weight(kind: str, basis: str, shape: tuple[int, ...]) -> None:
    layer, values, bias = Layer(kind=kind), inputs(6), inputs(OUT)
    x = inputs(*shape)
    y = spectral_linear(x, values, base=layer.base, places=PLACES, basis=basis, scale=0.7, bias=bias)
    assert torch.allclose(y, x @ layer.merged(values, PLACES, basis=basis, scale=0.7).T + bias, atol=1e-12)


# 4 tokens transform the inputs for the values' gradient, 15 the (out, in) product
@pytest.mark.parametrize(
    ("kind", "basis", "keep", "tokens", "biased"),
    list(itertools.product(KINDS, BASES, ["memory", "block", "speed"], [4, 15], [True, False])),
)
def test_gradients_of_inputs_values_and_bias_are_exact(kind: str, basis: str, keep: str, tokens: int, biased: bool) -> None:
    layer = Layer(kind=kind)

    def apply(x: torch.Tensor, values: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        weight = kept(keep, layer, values, basis)
        how = {"base": layer.base, "places": PLACES, "basis": basis, "scale": 0.7, "weight": weight}
        return spectral_linear(x, values, bias=bias[0] if bias else None, until_backward=keep == "block", **how)

    arguments = (inputs(1, tokens, IN), inputs(6)) + ((inputs(OUT),) if biased else ())
    assert torch.autograd.gradcheck(apply, arguments)


def test_the_identity_transform_is_a_sparse_addition_with_exact_gradients() -> None:
    layer = Layer()

    def apply(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return spectral_linear(
            x, values, base=layer.base, places=PLACES, basis="weight", scale=0.7, bias=None, transform="identity"
        )

    x, values = inputs(3, IN), inputs(6)
    assert torch.autograd.gradcheck(apply, (x, values))
    spectrum = torch.zeros(OUT * IN, dtype=torch.float64).index_add(0, PLACES.flat_index, values * 0.7).reshape(OUT, IN)
    assert torch.allclose(apply(x, values), x @ (layer.weight + spectrum).T)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("x_grad", "values_grad"), [(True, False), (False, True)])
def test_either_of_inputs_and_values_may_be_without_gradient(basis: str, x_grad: bool, values_grad: bool) -> None:
    layer = Layer()

    def gradients(*, both: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, values = inputs(3, IN, grad=x_grad or both), inputs(6, grad=values_grad or both)
        y = spectral_linear(x, values, base=layer.base, places=PLACES, basis=basis, scale=1.0, bias=None)
        y.square().sum().backward()
        return x.grad, values.grad

    for one, all_on, wanted in zip(gradients(both=False), gradients(both=True), (x_grad, values_grad), strict=True):
        assert (one is not None) == wanted
        assert one is None or torch.equal(one, all_on)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("keep", ["memory", "block", "speed"])
def test_checkpointing_changes_no_gradient(basis: str, keep: str) -> None:
    layer = Layer()

    def apply(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        how = {"base": layer.base, "places": PLACES, "basis": basis, "scale": 0.7, "weight": kept(keep, layer, values, basis)}
        return spectral_linear(x, values, bias=None, until_backward=keep == "block", **how).square()

    grads = []
    for call in (
        apply,
        lambda *a: checkpoint(apply, *a, use_reentrant=False),
        lambda *a: checkpoint(apply, *a, use_reentrant=True),
    ):
        x, values = inputs(3, IN), inputs(6)
        call(x, values).sum().backward()
        grads.append((x.grad, values.grad))
    for x_grad, values_grad in grads[1:]:
        assert torch.equal(x_grad, grads[0][0])
        assert torch.equal(values_grad, grads[0][1])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("until_backward", [False, True])
def test_checkpointing_does_not_compute_the_last_product_of_a_block_again(
    monkeypatch: pytest.MonkeyPatch, basis: str, until_backward: bool
) -> None:
    layer, x, values = Layer(kind="codes"), inputs(3, IN), inputs(6)
    products = 0
    linear = torch.nn.functional.linear

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal products
        products += 1
        return linear(*arguments)

    def block(x: torch.Tensor) -> torch.Tensor:
        how = {"base": layer.base, "places": PLACES, "basis": basis, "scale": 1.0, "bias": None, "until_backward": until_backward}
        hidden = spectral_linear(x, values, **how)
        return x + torch.nn.functional.pad(spectral_linear(torch.nn.functional.pad(hidden, (0, 2)), values, **how), (0, 2))

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert products == 3


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(
    ("keep", "x_grad", "calls", "weights"),
    [("memory", True, 2, 0), ("block", True, 1, 1), ("speed", True, 0, 1), ("memory", False, 1, 0), ("block", False, 1, 0)],
)
def test_the_weight_is_built_again_where_it_is_needed_and_one_that_is_handed_in_or_asked_for_is_kept(
    monkeypatch: pytest.MonkeyPatch, basis: str, keep: str, x_grad: bool, calls: int, weights: int
) -> None:
    built: list[torch.dtype] = []
    saved: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        built.append(arguments[3])
        return build_weight(*arguments)

    monkeypatch.setattr("qwha_cli.kernels.spectral_linear.build_weight", counted)
    layer, x, values = Layer(kind="codes"), inputs(3, IN, grad=x_grad), inputs(6)
    weight = kept(keep, layer, values, basis)
    # references, which cost nothing
    codes = {tensor.data_ptr() for tensor in layer.base.tensors}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in codes:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z = wht(x)
        only_transform = list(saved)
        how = {"weight": weight, "until_backward": keep == "block"}
        y = spectral_linear(x, values, base=layer.base, places=PLACES, basis=basis, scale=0.7, bias=None, **how)
    y.sum().backward()
    assert len(built) == calls
    # the values, the inputs in the codes' basis and what the transform itself keeps, which are its factors
    own = [*(only_transform if basis == "hadamard" else [])]
    assert sorted(saved[len(only_transform) :]) == sorted([*own, 6, z.numel(), *[OUT * IN] * weights])


class Weights:
    """Counts weights as they are built, and those that are still there whenever one is and whenever values get a gradient."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there: list[StorageWeakRef] = []
        self.seen: list[tuple[str, int]] = []

        def built(*arguments: Any) -> torch.Tensor:
            self.look("build")
            weight = build_weight(*arguments)
            self.there.append(StorageWeakRef(weight.untyped_storage()))
            return weight

        def gathered(*arguments: Any, **settings: Any) -> torch.Tensor:
            self.look("gradient")
            return gather_entries(*arguments, **settings)

        monkeypatch.setattr("qwha_cli.kernels.spectral_linear.build_weight", built)
        monkeypatch.setattr("qwha_cli.kernels.spectral_linear.gather_entries", gathered)

    def look(self, what: str) -> None:
        self.seen.append((what, sum(not one.expired() for one in self.there)))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_under_checkpointing_a_block_has_its_weights_from_its_recomputation_to_their_turn(
    monkeypatch: pytest.MonkeyPatch, basis: str, kind: str
) -> None:
    layer, values = Layer(IN, IN, kind=kind), inputs(6)
    places = Places.from_flat(PLACES.flat_index, shape=(IN, IN))

    def block(x: torch.Tensor) -> torch.Tensor:
        how = {"base": layer.base, "places": places, "basis": basis, "scale": 1.0, "bias": None, "until_backward": True}
        own = x.tanh()
        inner = sum(spectral_linear(own, values, **how).sin() for _ in range(2))
        return x + spectral_linear(inner, values, **how)

    weights, x = Weights(monkeypatch), inputs(3, IN)
    x = x * 1.0
    for _ in range(2):
        x = checkpoint(block, x, use_reentrant=False)
    assert weights.seen == [("build", 0)] * 6
    weights.look("between")
    assert weights.seen.pop() == ("between", 0)
    weights.seen.clear()
    x.sum().backward()
    turns = [("build", 0), ("build", 1), ("build", 2), ("gradient", 2), ("gradient", 1), ("gradient", 0)]
    assert weights.seen == turns * 2


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype_and_values_keep_float32_gradients(basis: str, dtype: torch.dtype) -> None:
    layer = Layer(dtype=torch.float32)
    x = inputs(4, IN).float().detach().requires_grad_()
    values = inputs(6).float().detach().requires_grad_()
    bias = torch.randn(OUT, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = spectral_linear(x, values, base=layer.base, places=PLACES, basis=basis, scale=1.0, bias=bias)
        assert y.dtype == dtype
        # the backward pass inside autocast must do the same as outside
        y.float().square().sum().backward()
    assert [t.grad.dtype for t in (x, values, bias) if t.grad is not None] == [torch.float32] * 3
    reference = x.double() @ layer.merged(values, PLACES, basis=basis, scale=1.0).T + bias.double()
    assert (y.double() - reference).abs().max() < 0.05 * reference.abs().max()


def test_float64_stays_float64_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = spectral_linear(inputs(2, IN), inputs(6), base=Layer().base, places=PLACES, basis="weight", scale=1.0, bias=None)
    assert y.dtype == torch.float64


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("tokens", [40, 200])
def test_bfloat16_is_as_good_as_the_dense_layer_in_bfloat16(basis: str, tokens: int) -> None:
    out_features, in_features = 96, 144
    layer = Layer(out_features, in_features, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    places = torch.randperm(out_features * in_features, generator=generator)[:700].sort().values.to(torch.int32)
    places = Places.from_flat(places, shape=(out_features, in_features))
    values = torch.randn(700, generator=generator) * 0.3
    x = torch.randn(tokens, in_features, generator=generator).to(torch.bfloat16)
    dy = torch.randn(tokens, out_features, generator=generator).to(torch.bfloat16)
    merged = layer.merged(values, places, basis=basis, scale=1.0)
    z = x.double() @ dense(in_features)
    exact = (x.double() @ merged.T, dy.double() @ merged, (dy.double().T @ z).flatten()[places.flat_index.long()])

    x.requires_grad_()
    values.requires_grad_()
    y = spectral_linear(x, values, base=layer.base, places=places, basis=basis, scale=1.0, bias=None)
    y.backward(dy)
    half_weight = merged.to(torch.bfloat16)
    half_z = (x.detach() @ dense(in_features, dtype=torch.bfloat16)).detach()
    plain = (x.detach() @ half_weight.T, dy @ half_weight, (dy.T @ half_z).flatten()[places.flat_index.long()])
    for ours, reference, truth in zip((y.detach(), x.grad, values.grad), plain, exact, strict=True):
        ours_error, plain_error = (ours.double() - truth).norm(), (reference.double() - truth).norm()
        assert ours_error <= 2 * plain_error


def test_values_changed_between_forward_and_backward_are_noticed() -> None:
    x, values = inputs(3, IN), inputs(6)
    y = spectral_linear(x, values, base=Layer().base, places=PLACES, basis="weight", scale=1.0, bias=None)
    with torch.no_grad():
        values += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_shapes_and_choices_that_do_not_fit_are_refused() -> None:
    layer = Layer()
    with pytest.raises(KernelError, match="5 values for 6 places"):
        spectral_linear(inputs(2, IN), inputs(5), base=layer.base, places=PLACES, basis="weight", scale=1.0, bias=None)
    with pytest.raises(KernelError, match="x has 24 columns, the weight has 12"):
        spectral_linear(inputs(2, 24), inputs(6), base=layer.base, places=PLACES, basis="weight", scale=1.0, bias=None)
    with pytest.raises(KernelError, match="identity transform has no Hadamard basis"):
        spectral_linear(
            inputs(2, IN),
            inputs(6),
            base=layer.base,
            places=PLACES,
            basis="hadamard",
            scale=1.0,
            bias=None,
            transform="identity",
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("keep", ["memory", "block", "speed"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_triton_trains_as_torch_does(basis: str, keep: str, bits: int) -> None:
    packed = run_quantizer(gaussian(192, 320), None, options("rtn", bits, 64, zeros="fine"))
    codes = type(packed)({name: t.cuda() for name, t in packed.tensors.items()}, packed.format, packed.shape).as_codes()
    places = random_places((192, 320), density=0.05)
    places = Places(places.row_starts.cuda(), places.columns.cuda(), places.shape)
    values = gaussian(1, len(places), seed=1)[0].cuda()
    x, dy = gaussian(50, 320, seed=2, std=1.0).cuda().bfloat16(), gaussian(50, 192, seed=3, std=1.0).cuda().bfloat16()
    found: list[list[torch.Tensor]] = []
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float64)):
        own, entries = x.clone().to(dtype).requires_grad_(), values.clone().requires_grad_()
        how = {"base": codes, "places": places, "basis": basis, "scale": 0.5, "backend": backend}
        weight = None
        if keep == "speed":
            how_built = {name: how[name] for name in ("basis", "scale", "backend")}
            weight = effective_weight(codes, values, places, dtype=dtype, **how_built)
        y = spectral_linear(own, entries, bias=None, weight=weight, until_backward=keep == "block", **how)
        y.backward(dy.to(dtype))
        assert entries.grad is not None
        assert entries.grad.dtype == torch.float32
        found.append([y.detach().double(), own.grad.double(), entries.grad.double()])
    for ours, reference, truth in zip(*found, strict=True):
        assert (ours - truth).norm() <= 1.1 * (reference - truth).norm() + 1e-3 * truth.norm()
