"""The low-rank update B A (LoRA's ΔW) as a value, and a frozen linear layer to which it is added.

    y = x Q̂ᵀ + b  (basis "weight")    or    y = (x H) Q̂ᵀ + b  (basis "hadamard"),    plus    s · (x Aᵀ) Bᵀ

`LowRank` passes between initializers, adapters and stages as SparseRows does for the sparse adapter. `frozen_linear` is the first
part: autograd would keep the dense weight of every layer for the backward pass, as much memory as the unquantized model has, so
with keep="memory" it is built again from the base. The second part is two ordinary products, which autograd differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwha_cli.errors import KernelError
from qwha_cli.kernels.effective_weight import Basis
from qwha_cli.kernels.spectral_linear import Keep
from qwha_cli.kernels.wht import wht


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix B A (out, in) by its factors.

    Attributes:
        a: (rank, in), floating, float32 when an initializer made it.
        b: (out, rank), same dtype and device.
    """

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise KernelError(f"factors {tuple(self.b.shape)} and {tuple(self.a.shape)} have no common rank")

    @property
    def rank(self) -> int:
        """Columns of B, rows of A."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def num_values(self) -> int:
        """Numbers in both factors: rank · (in + out)."""
        return self.a.numel() + self.b.numel()

    def divided(self, scale: float) -> LowRank:
        """The factors whose product times `scale` is this one."""
        return LowRank(self.a, self.b / scale)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LowRank:
        """The same factors on another device and, if given, in another dtype."""
        return LowRank(self.a.to(device=device, dtype=dtype), self.b.to(device=device, dtype=dtype))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """B A (out, in), in the weight basis, of the factors' dtype unless another is given."""
        a, b = (self.a, self.b) if dtype is None else (self.a.to(dtype), self.b.to(dtype))
        return b @ a


def frozen_linear(
    x: Tensor, *, base: Callable[[torch.dtype], Tensor], basis: Basis, bias: Tensor | None, keep: Keep = "memory"
) -> Tensor:
    """Apply a linear layer whose weight gets no gradient.

    Args:
        x: (..., in), floating, any device. Autocast is the caller's to apply.
        base: Gives Q̂ (out, in) in its own basis and the dtype asked for. Called again in the backward pass, so it must give the
            same weight then.
        basis: Where the base's codes live.
        bias: (out,) or None.
        keep: What the backward pass finds: nothing, or the dense weight.

    Returns:
        (..., out), dtype of x; differentiable in x and in the bias.
    """
    with torch.autocast(x.device.type, enabled=False):
        result: Tensor = _FrozenLinear.apply(x, None if bias is None else bias.to(x.dtype), _Layer(base, basis, keep))
    return result


@dataclass(frozen=True)
class _Layer:
    """What one call knows besides its tensors."""

    base: Callable[[torch.dtype], Tensor]
    basis: Basis
    keep: Keep


class _FrozenLinear(torch.autograd.Function):
    """y = z Q̂ᵀ + b with z = x or x H; dx = dy Q̂ or (dy Q̂) Hᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:  # noqa: ANN401
        weight = layer.base(x.dtype)
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.save_for_backward(*((weight,) if layer.keep == "speed" else ()))
        return torch.nn.functional.linear(wht(x) if layer.basis == "hadamard" else x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the parameter names
        ctx: Any,  # noqa: ANN401
        *grad_outputs: Tensor,
    ) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        layer: _Layer = ctx.layer
        dx = dbias = None
        # a caller may run the backward pass inside autocast too
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy @ (ctx.saved_tensors[0] if ctx.saved_tensors else layer.base(ctx.dtype))
                dx = wht(dx, transpose=True) if layer.basis == "hadamard" else dx
            if ctx.needs_input_grad[1]:
                dbias = dy.reshape(-1, dy.shape[-1]).sum(dim=0)
        return dx, dbias, None
