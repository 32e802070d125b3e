"""A linear layer of a frozen base and a trainable sparse adapter in the Walsh-Hadamard domain, forward and backward.

    basis "weight":    y = x (Q̂ + s F Hᵀ)ᵀ + b         dF = s · (dyᵀ x) H = s · dyᵀ (x H)   dx = dy W
    basis "hadamard":  y = z (Q̂ + s F)ᵀ + b, z = x H   dF = s · dyᵀ z                       dz = dy W,  dx = dz Hᵀ

The values' gradient is dF read at F's places. The dense effective weight W of every layer kept alive for the backward pass would
cost as much as the unquantized model, so the backward pass builds it again from the base, and only where inputs want a gradient;
a caller who has it already hands it in, and it is used twice. The base gets no gradient. z is made by a differentiable
operation before, so that layers with the same input can share it: each hands it on to the next, and in the backward pass adds
its dz, within the product, to what the layers after it have found. Paper §3.1; the weight-side form costs one product of the
tokens, not two. In the Hadamard basis the three products can be of 8-bit numbers: fp8_products.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.codes import Codes, put_together, taken_apart
from qwha_cli.kernels.effective_weight import Basis, Transform, build_weight, check_shapes, gather_entries, transform_backend
from qwha_cli.kernels.fp8 import Fp8Matrix
from qwha_cli.kernels.fp8_products import fp8_gradients, fp8_product, suits_fp8
from qwha_cli.kernels.gradient_chain import is_ours, mark_ours, mark_takes_parts, takes_parts
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.shared_fp8 import hand_on_fp8, known_as, shared_fp8
from qwha_cli.kernels.shared_wht import hand_on, shared_wht
from qwha_cli.kernels.stand_in import stands_in
from qwha_cli.kernels.weight_fp8 import Fp8Weight, turned_fp8, weight_fp8
from qwha_cli.kernels.wht import wht

Keep = Literal["memory", "block", "speed"]


def spectral_linear(
    x: Tensor,
    values: Tensor,
    *,
    base: Codes | Tensor,
    places: Places,
    basis: Basis,
    scale: float,
    bias: Tensor | None,
    transform: Transform = "wht",
    backend: Requested = "auto",
    weight: Tensor | None = None,
    until_backward: bool = False,
    fp8: bool | Fp8Weight = False,
) -> Tensor:
    """Apply the adapted layer.

    Args:
        x: (..., in), floating, any device.
        values: (nnz,), floating; usually float32 and trainable.
        base: Q̂ (out, in) in its own basis, quantized or dense. Read again in the backward pass, so it must not change before.
        places: Where the values lie in F.
        basis: Where the base's codes live.
        scale: Factor s of the adapter.
        bias: (out,) or None.
        transform: `identity` puts F into the weight domain itself; only for basis "weight".
        backend: Which implementation builds the weight.
        weight: The effective weight (out, in) in the base's basis and the dtype of the computation, where the caller has it and
            keeps it; None to build it here.
        until_backward: Whether a weight that is built here, where inputs want a gradient, is saved for the backward pass instead
            of being built again there. Meant for checkpointing, which drops it at once in the first forward pass, so that only
            the weights of the block whose turn it is are there. Of no use to 8-bit products.
        fp8: Whether products are of 8-bit numbers where `suits_fp8` says so; or the weight as such, where the caller has it and
            keeps it. Only for basis "hadamard". Then no dense weight is built or read: each pass writes the form it needs.

    Returns:
        (..., out), computed in the autocast dtype where autocast is on for x's device, else in x's dtype.

    Raises:
        KernelError: Shapes that do not fit, the identity transform in the Hadamard basis, or 8-bit products in another.
    """
    check_shapes(base, values, places)
    if basis == "hadamard" and transform == "identity":
        raise KernelError("the identity transform has no Hadamard basis", remedy="use basis weight or transform wht")
    if x.shape[-1] != places.shape[1]:
        raise KernelError(f"x has {x.shape[-1]} columns, the weight has {places.shape[1]}")
    if fp8 is not False and basis != "hadamard":
        raise KernelError("8-bit products are of transforms", remedy="use basis hadamard")
    dtype = computing_dtype(x)
    bias = bias.to(dtype) if bias is not None else None
    eight = fp8 is not False and suits_fp8(x, places.shape, dtype)
    with torch.autocast(x.device.type, enabled=False):
        z = basis_input(x, dtype, basis=basis, backend=backend, fp8=eight)
        how = _How(places, scale, basis == "hadamard" or transform == "identity", backend, shared=basis == "hadamard")
        wanted = until_backward and z.requires_grad
        known: Tensor | _Eight | None = weight
        with torch.no_grad():
            if eight:
                if isinstance(fp8, Fp8Weight):
                    own, backward = Fp8Matrix(fp8.values, fp8.scales), (fp8.turned, fp8.turned_scales)
                else:
                    own, *backward = how.forward(base, values)
                known = _Eight(own, tuple(backward), shared_fp8(z, backend=backend), takes_parts(z))
            elif weight is None and wanted:
                known = how.weight(base, values, dtype)
        rest = (bias, known, base, how)
        promise, passed = cast("tuple[Tensor, Tensor | None]", _Gradients.apply(z, values, *rest))
        if passed is not None:
            hand_on(x, z, passed)
            if isinstance(known, _Eight):
                if stands_in(z):
                    known_as(known.z, passed)
                else:
                    hand_on_fp8(known.z, passed)
                if known.apart:
                    mark_takes_parts(passed)
        result: Tensor = _Product.apply(promise, z, values, *rest)
    return result


def computing_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes: autocast's where it is on, else that of x; autocast leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def basis_input(x: Tensor, dtype: torch.dtype, *, basis: Basis, backend: Requested = "auto", fp8: bool = False) -> Tensor:
    """What multiplies a weight in a basis: x or x H (..., in), of `dtype`. Layers with one input share its transform.

    With `fp8` a transform may have no numbers but those of its 8-bit form, see `shared_fp8`.
    """
    return shared_wht(x, dtype=dtype, backend=transform_backend(backend), fp8=fp8) if basis == "hadamard" else x.to(dtype)


@dataclass(frozen=True, eq=False)
class _How:
    """What both halves of the layer know besides tensors that may want a gradient."""

    places: Places
    scale: float
    plain: bool
    backend: Requested
    shared: bool

    def weight(self, base: Codes | Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        return build_weight(base, values, self.places, dtype, self.scale, self.plain, self.backend)

    def forward(self, base: Codes | Tensor, values: Tensor) -> tuple[Fp8Matrix, Tensor]:
        return weight_fp8(base, values, self.places, scale=self.scale, backend=self.backend)

    def turned(self, base: Codes | Tensor, values: Tensor, most: Tensor) -> Fp8Matrix:
        return turned_fp8(base, values, self.places, most, scale=self.scale, backend=self.backend)


@dataclass(frozen=True, eq=False)
class _Eight:
    """What a layer whose products are of 8-bit numbers knows before they run.

    Attributes:
        weight: W for the forward pass.
        backward: What the backward pass takes: Wᵀ as two tensors, if it is kept, or what its scale is the largest of.
        z: The transform.
        apart: Whether its gradient may come in parts.
    """

    weight: Fp8Matrix
    backward: tuple[Tensor, ...]
    z: Fp8Matrix
    apart: bool


class _Gradients(torch.autograd.Function):
    """All of the layer's backward pass; forward computes nothing and returns a promise of y, an empty tensor of its shape.

    It also passes on a shared z, the same numbers under another name, for the next layer with this input. So the backward pass
    gives this function the sum of what all later layers want of z, and dz is added to that in the product itself; if each gave
    its own dz to z, autograd would write them all and add them in kernels of its own.

    Checkpointing computes a block again until it has met the last tensor that was saved. This function saves all that the layer
    needs before the product runs, and nothing is saved after it, so that the block's last product, the widest of all, is not
    computed a second time for nothing. A weight that is saved is built before, and so is there when the block's last layer ends
    the recomputation; one of 8-bit numbers is built before as well, because its largest scale is saved.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        z: Tensor,
        values: Tensor,
        bias: Tensor | None,
        weight: Tensor | _Eight | None,
        base: Codes | Tensor,
        how: _How,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.how, ctx.dtype = how, z.dtype
        ctx.eight = isinstance(weight, _Eight)
        ctx.kept = len(weight.backward) == 2 if isinstance(weight, _Eight) else weight is not None
        again = ctx.needs_input_grad[0] and not ctx.kept
        tensors, ctx.form = taken_apart(base) if again else ((), None)
        # None instead of zeros for a y, or a z that was passed on, that nobody used
        ctx.set_materialize_grads(False)
        if isinstance(weight, _Eight):
            ctx.apart = weight.apart
            ctx.save_for_backward(values, weight.z.values, weight.z.scales, *weight.backward, *tensors)
        else:
            ctx.save_for_backward(values, z, weight, *tensors)
        promise = z.new_empty(()).expand(*z.shape[:-1], how.places.shape[0])
        return promise, z.detach() if how.shared and ctx.needs_input_grad[0] else None

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the parameter names
        ctx: Any,  # noqa: ANN401
        *grad_outputs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        dy, passed = grad_outputs
        if dy is None:
            # what was saved stays untouched: it is gone if only a layer that came later is differentiated a second time
            return passed, None, None, None, None, None
        # a caller may run the backward pass inside autocast too
        with torch.autocast(dy.device.type, enabled=False):
            return *_gradients(ctx, dy, passed), None, None, None


class _Product(torch.autograd.Function):
    """y = z Wᵀ + b. Saves nothing: the gradient of y goes to whom promised it."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        promise: Tensor,
        z: Tensor,
        values: Tensor,
        bias: Tensor | None,
        weight: Tensor | _Eight | None,
        base: Codes | Tensor,
        how: _How,
    ) -> Tensor:
        if isinstance(weight, _Eight):
            return fp8_product(weight.z, weight.weight, bias, dtype=z.dtype).view(*z.shape[:-1], -1)
        if weight is None:
            weight = how.weight(base, values, z.dtype)
        return torch.nn.functional.linear(z, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        return grad_outputs[0], None, None, None, None, None, None


def _gradients(ctx: Any, dy: Tensor, passed: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
    """Gradients of z, values and bias, each None when not needed; that of z with what came for the z that was passed on."""
    how: _How = ctx.how
    # checkpointing hands out what it computed again a single time
    values, *saved = ctx.saved_tensors
    dz, spectrum = (_gradients_of_eight if ctx.eight else _dense_gradients)(ctx, dy, passed, values, saved)
    if dz is not None and how.shared:
        mark_ours(dz)
    dvalues = dbias = None
    if spectrum is not None:
        dvalues = gather_entries(spectrum, how.places, scale=how.scale, backend=how.backend).to(values.dtype)
    if ctx.needs_input_grad[2]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(dim=0)
    return dz, dvalues, dbias


def _dense_gradients(
    ctx: Any,  # noqa: ANN401
    dy: Tensor,
    passed: Tensor | None,
    values: Tensor,
    saved: list[Any],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z and dF / s (out, in), each None when not needed. Empties `saved`, the tensors that were."""
    z, weight, *tensors = saved
    saved.clear()
    how: _How = ctx.how
    dz = spectrum = None
    if ctx.needs_input_grad[0]:
        if weight is None:
            weight = how.weight(put_together(tensors, ctx.form), values, ctx.dtype)
        dz = _added_product(passed, dy, weight)
    # freed before the values' gradient, which is as large
    del weight
    if ctx.needs_input_grad[1]:
        rows, flat = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1])
        spectrum = _spectrum_gradient(rows, flat, plain=how.plain, backend=transform_backend(how.backend))
    return dz, spectrum


def _gradients_of_eight(
    ctx: Any,  # noqa: ANN401
    dy: Tensor,
    passed: Tensor | None,
    values: Tensor,
    saved: list[Any],
) -> tuple[Tensor | None, Tensor | None]:
    """As `_dense_gradients`, by products of 8-bit numbers."""
    z_values, z_scales, first, *tensors = saved
    how: _How = ctx.how
    weight = None
    if ctx.needs_input_grad[0]:
        if ctx.kept:
            weight = Fp8Matrix(first, tensors[0])
        else:
            weight = how.turned(put_together(tensors, ctx.form), values, first)
    what = {"dtype": ctx.dtype, "wanted": ctx.needs_input_grad[1], "apart": ctx.apart, "backend": how.backend}
    return fp8_gradients(dy, passed, Fp8Matrix(z_values, z_scales), weight, **what)  # pyright: ignore[reportArgumentType]


def _added_product(passed: Tensor | None, dy: Tensor, weight: Tensor) -> Tensor:
    """The product dy W (..., in), plus what later layers have found for the same z, written over theirs if that is ours alone."""
    if passed is None:
        return dy @ weight
    rows = dy.reshape(-1, dy.shape[-1])
    # autograd has seen to shape and dtype
    if is_ours(passed):
        passed.view(-1, passed.shape[-1]).addmm_(rows, weight)
        return passed
    return torch.addmm(passed.reshape(-1, passed.shape[-1]), rows, weight).view(passed.shape)


def _spectrum_gradient(dy: Tensor, z: Tensor, *, plain: bool, backend: Requested) -> Tensor:
    """Gradient dF / s (out, in) from dy (tokens, out) and z (tokens, in), the inputs in the base's basis."""
    if plain:
        return dy.mT @ z
    # (dyᵀ x) H = dyᵀ (x H): transform whichever has fewer rows
    return dy.mT @ wht(z, backend=backend) if dy.shape[0] < dy.shape[1] else wht(dy.mT @ z, backend=backend)
