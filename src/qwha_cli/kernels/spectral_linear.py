"""A linear layer of a frozen base and a trainable sparse adapter in the Walsh-Hadamard domain, forward and backward.

    basis "weight":    y = x (Q̂ + s F Hᵀ)ᵀ + b         dF = s · (dyᵀ x) H = s · dyᵀ (x H)   dx = dy W
    basis "hadamard":  y = (x H) (Q̂ + s F)ᵀ + b        dF = s · dyᵀ (x H)                   dx = (dy W) Hᵀ

The values' gradient is dF gathered at F's places. The dense effective weight W of every layer kept alive for the backward pass
would cost as much as the unquantized model, so with keep="memory" the backward pass builds it again from the base; keep="speed"
saves it. The base gets no gradient. Paper §3.1; the weight-side form costs one product of the tokens, not two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwha_cli.errors import KernelError
from qwha_cli.kernels.effective_weight import Basis, Transform, effective_weight
from qwha_cli.kernels.wht import wht

Keep = Literal["memory", "speed"]


def spectral_linear(
    x: Tensor,
    values: Tensor,
    *,
    base: Callable[[torch.dtype], Tensor],
    flat_index: Tensor,
    basis: Basis,
    scale: float,
    bias: Tensor | None,
    keep: Keep = "memory",
    transform: Transform = "wht",
) -> Tensor:
    """Apply the adapted layer.

    Args:
        x: (..., in), floating, any device.
        values: (nnz,), floating; usually float32 and trainable.
        base: Gives Q̂ (out, in) in its own basis and the dtype asked for. Called again in the backward pass, so it must give the
            same weight then.
        flat_index: (nnz,) int32 or int64, row · in + column; repeats add up.
        basis: Where the base's codes live.
        scale: Factor s of the adapter.
        bias: (out,) or None.
        keep: What the backward pass finds: the inputs only, or also the dense weight and the transformed inputs.
        transform: `identity` puts F into the weight domain itself; only for basis "weight".

    Returns:
        (..., out), computed in the autocast dtype where autocast is on for x's device, else in x's dtype.

    Raises:
        KernelError: Shapes that do not fit, or the identity transform in the Hadamard basis.
    """
    if values.shape != flat_index.shape:
        raise KernelError(f"{values.numel()} values for {flat_index.numel()} places")
    if basis == "hadamard" and transform == "identity":
        raise KernelError("the identity transform has no Hadamard basis", remedy="use basis weight or transform wht")
    device = x.device.type
    # autocast leaves float64 alone everywhere else, so here too
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    bias = bias.to(x.dtype) if bias is not None else None
    with torch.autocast(device, enabled=False):
        result: Tensor = _SpectralLinear.apply(x, values, bias, flat_index, _Layer(base, basis, scale, keep, transform))
    return result


@dataclass(frozen=True)
class _Layer:
    """What one call knows besides its tensors."""

    base: Callable[[torch.dtype], Tensor]
    basis: Basis
    scale: float
    keep: Keep
    transform: Transform

    def weight(self, values: Tensor, flat_index: Tensor, dtype: torch.dtype) -> Tensor:
        base = self.base(dtype)
        return effective_weight(base, values, flat_index, basis=self.basis, scale=self.scale, transform=self.transform)


class _SpectralLinear(torch.autograd.Function):
    """The formulas of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, flat_index: Tensor, layer: _Layer) -> Tensor:  # noqa: ANN401
        weight = layer.weight(values, flat_index, x.dtype)
        if weight.shape[1] != x.shape[-1]:
            raise KernelError(f"x has {x.shape[-1]} columns, the weight has {weight.shape[1]}")
        z = wht(x) if layer.basis == "hadamard" else x
        ctx.layer = layer
        ctx.num_out = weight.shape[0]
        kept = (z, weight) if layer.keep == "speed" else (x, None)
        ctx.save_for_backward(values, flat_index, *kept)
        return torch.nn.functional.linear(z, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the parameter names
        ctx: Any,  # noqa: ANN401
        *grad_outputs: Tensor,
    ) -> tuple[Tensor | None, ...]:
        # a caller may run the backward pass inside autocast too
        with torch.autocast(grad_outputs[0].device.type, enabled=False):
            return *_gradients(ctx, grad_outputs[0]), None, None


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
    """Gradients of x, values and bias, each None when not needed."""
    values, flat_index, kept, weight = ctx.saved_tensors
    layer: _Layer = ctx.layer
    rotated = layer.basis == "hadamard"
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        if weight is None:
            weight = layer.weight(values, flat_index, kept.dtype)
        dx = dy @ weight
        dx = wht(dx, transpose=True) if rotated else dx
    if ctx.needs_input_grad[1]:
        z = wht(kept) if rotated and layer.keep == "memory" else kept
        spectrum = _spectrum_gradient(dy.reshape(-1, ctx.num_out), z.reshape(-1, z.shape[-1]), layer)
        dvalues = spectrum.reshape(-1).index_select(0, flat_index).to(values.dtype) * layer.scale
    if ctx.needs_input_grad[2]:
        dbias = dy.reshape(-1, ctx.num_out).sum(dim=0)
    return dx, dvalues, dbias


def _spectrum_gradient(dy: Tensor, z: Tensor, layer: _Layer) -> Tensor:
    """Gradient dF / s (out, in) from dy (tokens, out) and z (tokens, in), the inputs in the base's basis."""
    if layer.basis == "hadamard" or layer.transform == "identity":
        return dy.mT @ z
    # (dyᵀ x) H = dyᵀ (x H): transform whichever has fewer rows
    return dy.mT @ wht(z) if dy.shape[0] < dy.shape[1] else wht(dy.mT @ z)
