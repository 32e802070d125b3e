"""Layers with one input: what each wants of it adds up in their products, exactly, and in nobody else's memory."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.low_rank import frozen_linear
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.shared_wht import shared_wht
from qwha_cli.kernels.spectral_linear import spectral_linear
from support.codes import random_places
from support.quantized import gaussian, options, run_quantizer

IN = 12
OUTS = (10, 14, 6)
BASES = ["weight", "hadamard"]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Reader:
    """An adapted layer, and its effective weight in the weight basis."""

    def __init__(self, out_features: int, *, basis: str, seed: int) -> None:
        self.base, self.basis = numbers(out_features, IN, seed=seed), basis
        self.places = random_places((out_features, IN), density=0.2)
        self.values = numbers(len(self.places), seed=seed + 100).requires_grad_()

    def __call__(self, x: Tensor, **settings: Any) -> Tensor:
        how = {"base": self.base, "places": self.places, "basis": self.basis, "scale": 0.7, "bias": None}
        return spectral_linear(x, self.values, **how, **settings)

    def merged(self) -> Tensor:
        spectrum = torch.zeros(self.base.numel(), dtype=torch.float64)
        spectrum = spectrum.index_add(0, self.places.flat_index.long(), self.values * 0.7).view(self.base.shape)
        if self.basis == "hadamard":
            return (self.base + spectrum) @ dense(IN).T
        return self.base + spectrum @ dense(IN).T


def readers(basis: str = "hadamard", outs: Sequence[int] = OUTS) -> list[Reader]:
    return [Reader(out, basis=basis, seed=seed) for seed, out in enumerate(outs)]


def hidden(leaf: Tensor) -> Tensor:
    """An input as a norm gives it: no leaf, and its graph saves something."""
    return leaf.tanh()


def gradients(layers: Sequence[Reader], loss: Callable[[Tensor], Tensor], *, tokens: tuple[int, ...] = (2, 3)) -> list[Any]:
    """Of the input and of each layer's values."""
    for layer in layers:
        layer.values.grad = None
    leaf = numbers(*tokens, IN, seed=9).requires_grad_()
    loss(leaf).backward()
    return [leaf.grad, *(layer.values.grad for layer in layers)]


def assert_equal(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


SUBSETS = [used for count in (1, 2, 3) for used in itertools.combinations(range(3), count)]


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("used", SUBSETS)
@pytest.mark.parametrize("tokens", [(), (2, 3), (30,), (0,)])
def test_gradients_are_exact_whichever_outputs_are_used(basis: str, used: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    layers = readers(basis)

    def ours(leaf: Tensor) -> Tensor:
        x = hidden(leaf)
        outputs = [layer(x) for layer in layers]
        return sum(outputs[index].square().sum() for index in used)

    def reference(leaf: Tensor) -> Tensor:
        return sum((hidden(leaf) @ layers[index].merged().T).square().sum() for index in used)

    assert_equal(gradients(layers, ours, tokens=tokens), gradients(layers, reference, tokens=tokens))


# a frozen layer, or a reader of the transform itself, at every place in the row
@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["frozen", "transform", "both"])
def test_others_may_read_the_same_transform_in_between(kind: str, place: int) -> None:
    layers, weight = readers(), numbers(5, IN, seed=50)

    def others(x: Tensor) -> Tensor:
        found = torch.zeros((), dtype=torch.float64)
        if kind != "transform":
            found = found + frozen_linear(x, base=weight, basis="hadamard", bias=None).square().sum()
        if kind != "frozen":
            found = found + shared_wht(x).pow(3).sum()
        return found

    def ours(leaf: Tensor) -> Tensor:
        x = hidden(leaf)
        found = torch.zeros((), dtype=torch.float64)
        for index, layer in enumerate(layers):
            found = found + (others(x) if index == place else 0) + layer(x).square().sum()
        return found + (others(x) if place == 3 else 0)

    def reference(leaf: Tensor) -> Tensor:
        x = hidden(leaf)
        z = x @ dense(IN)
        found = sum((x @ layer.merged().T).square().sum() for layer in layers)
        found = found + ((z @ weight.T).square().sum() if kind != "transform" else 0)
        return found + (z.pow(3).sum() if kind != "frozen" else 0)

    assert_equal(gradients(layers, ours), gradients(layers, reference))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("until_backward", [False, True])
# the last layer of what is computed again reads the shared input, or another
@pytest.mark.parametrize("last", [False, True])
def test_checkpointing_changes_no_gradient(basis: str, reentrant: bool, until_backward: bool, last: bool) -> None:
    layers, after = readers(basis), Reader(IN, basis=basis, seed=40)
    how = {"until_backward": until_backward}

    def block(leaf: Tensor) -> Tensor:
        x = hidden(leaf)
        q, k, v = (layer(x, **how) for layer in layers)
        inner = x * q.sum(-1, keepdim=True) + k.sum(-1, keepdim=True) * v.sum(-1, keepdim=True)
        return inner if last else leaf + after(inner, **how)

    def apart(leaf: Tensor) -> Tensor:
        return block(leaf).square().sum()

    def again(leaf: Tensor) -> Tensor:
        return checkpoint(block, leaf, use_reentrant=reentrant).square().sum()

    def twice(leaf: Tensor) -> Tensor:
        # the second block's input is no leaf, and what was found for it in the forward pass is still there
        return checkpoint(block, leaf.sin(), use_reentrant=reentrant).square().sum()

    every = [*layers, after]
    for one, other in zip(gradients(every, again), gradients(every, apart), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert_equal(gradients(every, twice), gradients(every, lambda leaf: apart(leaf.sin())))


def test_an_input_of_a_checkpointed_block_may_be_read_by_its_layers_directly() -> None:
    layers = readers()

    def block(x: Tensor) -> Tensor:
        return sum(layer(x, until_backward=True).square().sum(-1) for layer in layers)

    def ours(leaf: Tensor) -> Tensor:
        x = hidden(leaf)
        return (checkpoint(block, x, use_reentrant=False) + layers[0](x).square().sum(-1)).sum()

    def reference(leaf: Tensor) -> Tensor:
        x = hidden(leaf)
        return sum((x @ layer.merged().T).square().sum() for layer in [*layers, layers[0]])

    assert_equal(gradients(layers, ours), gradients(layers, reference))


class Counted(TorchDispatchMode):
    """Counts the operations of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_three_layers_take_three_products_for_it_and_no_addition() -> None:
    layers, x = readers(), hidden(numbers(7, IN, seed=9).requires_grad_())
    outputs = [layer(x) for layer in layers]
    starts = [torch.ones_like(y) for y in outputs]
    with Counted() as mode:
        torch.autograd.backward(outputs, starts)
    # three more are the values' gradients
    assert (mode.seen["mm"], mode.seen["addmm_"]) == (4, 2)
    assert not {"add", "add_", "addmm"} & set(mode.seen)


def test_a_gradient_that_others_hold_is_not_written_to() -> None:
    layers, x = readers(), hidden(numbers(7, IN, seed=9).requires_grad_())
    outputs = [layer(x) for layer in layers]
    mine = numbers(7, IN, seed=60)
    before = mine.clone()
    torch.autograd.backward([shared_wht(x), *outputs], [mine, *(torch.ones_like(y) for y in outputs)])
    assert torch.equal(mine, before)


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    layers, leaf = readers(), numbers(7, IN, seed=9).requires_grad_()
    x = hidden(leaf)
    loss = sum(layer(x).square().sum() for layer in layers)
    tensors = [leaf, *(layer.values for layer in layers)]
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    recorded = torch.autograd.grad(loss, tensors, retain_graph=True, create_graph=True)
    last = torch.autograd.grad(loss, tensors)
    assert_equal(recorded, first)
    assert all(torch.equal(one, other) for one, other in zip(last, first, strict=True))


def test_a_layer_that_comes_after_the_others_backward_pass_is_differentiated_through_them() -> None:
    layers, leaf = readers(), numbers(7, IN, seed=9).requires_grad_()
    x = leaf + 2.0
    layers[0](x).square().sum().backward()
    leaf.grad = None
    layers[1](x).square().sum().backward()
    found, leaf.grad = leaf.grad, None
    ((leaf + 2.0) @ layers[1].merged().T).square().sum().backward()
    assert_equal([found], [leaf.grad])


def test_only_an_input_that_wants_a_gradient_is_handed_on() -> None:
    layers, frozen = readers(), numbers(7, IN, seed=9)
    first = shared_wht(frozen)
    for layer in layers:
        layer(frozen)
        assert shared_wht(frozen) is first
    x = hidden(numbers(7, IN, seed=9).requires_grad_())
    with torch.no_grad():
        layers[0](x)
        assert shared_wht(x) is shared_wht(x)
    first = shared_wht(x)
    layers[0](x)
    assert shared_wht(x) is not first
    assert shared_wht(x).data_ptr() == first.data_ptr()
    with torch.inference_mode():
        layers[0](x)


@pytest.mark.parametrize("basis", BASES)
def test_the_gradient_itself_is_not_differentiated_and_functional_transforms_are_refused(basis: str) -> None:
    layers, leaf = readers(basis), numbers(7, IN, seed=9).requires_grad_()
    x = hidden(leaf)
    (grad,) = torch.autograd.grad(sum(layer(x).square().sum() for layer in layers), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: layers[0](x).sum())(numbers(7, IN, seed=9))


def test_under_autocast_three_layers_are_no_worse_than_each_for_itself() -> None:
    layers, leaf = readers(), numbers(7, IN, seed=9).float().requires_grad_()
    starts = [numbers(7, out, seed=30 + out) for out in OUTS]

    def gradient(*, shared: bool) -> Tensor:
        leaf.grad = None
        x = hidden(leaf)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # another object has another transform
            outputs = [layer(x if shared else x.view_as(x)) for layer in layers]
        torch.autograd.backward(outputs, [start.bfloat16() for start in starts])
        assert leaf.grad is not None
        return leaf.grad.double()

    exact = sum(start @ layer.merged().detach() for start, layer in zip(starts, layers, strict=True))
    exact = exact * (1 - leaf.detach().double().tanh().square())
    assert (gradient(shared=True) - exact).norm() <= 1.5 * (gradient(shared=False) - exact).norm()


def test_what_layers_hand_on_ends_with_their_input() -> None:
    layers = readers()
    gc.disable()
    try:
        leaf = numbers(7, IN, seed=9).requires_grad_()
        x = hidden(leaf)
        outputs = [layer(x) for layer in layers]
        node, own = weakref.ref(shared_wht(x)), weakref.ref(x)
        del x, outputs
        assert own() is None
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_three_layers_take_their_products_alone_and_are_as_good_as_torch() -> None:
    def codes(seed: int) -> Codes:
        packed = run_quantizer(gaussian(192, 320, seed=seed), None, options("rtn", 2, 64, zeros="fine"))
        return type(packed)({n: t.cuda() for n, t in packed.tensors.items()}, packed.format, packed.shape).as_codes()

    bases = [codes(seed) for seed in range(3)]
    places = random_places((192, 320), density=0.05)
    places = Places(places.row_starts.cuda(), places.columns.cuda(), places.shape)
    values = [gaussian(1, len(places), seed=seed)[0].cuda() for seed in range(3)]
    x, dy = gaussian(50, 320, seed=2, std=1.0).cuda().bfloat16(), gaussian(50, 192, seed=3, std=1.0).cuda().bfloat16()
    found: list[Tensor] = []
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float64)):
        leaf = x.clone().to(dtype).requires_grad_()
        own = leaf * 1.0
        how = {"places": places, "basis": "hadamard", "scale": 0.5, "backend": backend, "bias": None}
        outputs = [spectral_linear(own, v, base=base, **how) for v, base in zip(values, bases, strict=True)]
        with Counted() as mode:
            torch.autograd.backward(outputs, [dy.to(dtype)] * 3)
        assert mode.seen["addmm_"] == 2
        assert not {"add", "add_", "addmm"} & set(mode.seen)
        found.append(leaf.grad.double())
    ours, reference, truth = found
    assert (ours - truth).norm() <= 1.1 * (reference - truth).norm() + 1e-3 * truth.norm()
