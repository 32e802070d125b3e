"""The low-rank update B A (LoRA's ΔW) as a value, and a frozen linear layer to which it is added.

    y = x Q̂ᵀ + b  (basis "weight")    or    y = (x H) Q̂ᵀ + b  (basis "hadamard"),    plus    s · (x Aᵀ) Bᵀ

`LowRank` passes between initializers, adapters and stages as SparseRows does for the sparse adapter. `frozen_linear` is the first
part: autograd would keep the dense weight of every layer for the backward pass, as much memory as the unquantized model has, so
with keep="memory" it is built again from the base. With keep="block" the backward pass finds that of the last forward pass, which
checkpointing makes the recomputation's. The second part is two ordinary products, which autograd differentiates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.codes import Codes, put_together, taken_apart
from qwha_cli.kernels.dequantize import dense_base
from qwha_cli.kernels.effective_weight import Basis
from qwha_cli.kernels.spectral_linear import Keep, basis_input


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
    x: Tensor,
    *,
    base: Codes | Tensor,
    basis: Basis,
    bias: Tensor | None,
    keep: Keep = "memory",
    backend: Requested = "auto",
) -> Tensor:
    """Apply a linear layer whose weight gets no gradient.

    Args:
        x: (..., in), floating, any device. Autocast is the caller's to apply.
        base: Q̂ (out, in) in its own basis, quantized or dense. Read again in the backward pass, so it must not change before.
        basis: Where the base's codes live.
        bias: (out,) or None.
        keep: What the backward pass finds: nothing, or the dense weight.
        backend: Which implementation makes codes dense.

    Returns:
        (..., out), dtype of x; differentiable in x and in the bias.
    """
    with torch.autocast(x.device.type, enabled=False):
        z = basis_input(x, x.dtype, basis=basis, backend=backend)
        result: Tensor = _FrozenLinear.apply(z, None if bias is None else bias.to(x.dtype), base, keep, backend)
    return result


class _FrozenLinear(torch.autograd.Function):
    """y = z Q̂ᵀ + b; dz = dy Q̂."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        z: Tensor,
        bias: Tensor | None,
        base: Codes | Tensor,
        keep: Keep,
        backend: Requested,
    ) -> Tensor:
        weight = dense_base(base, z.dtype, backend=backend)
        ctx.dtype, ctx.backend = z.dtype, backend
        ctx.kept = keep != "memory"
        tensors, ctx.form = ((weight,), None) if ctx.kept else taken_apart(base)
        ctx.save_for_backward(*(tensors if ctx.needs_input_grad[0] else ()))
        return torch.nn.functional.linear(z, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the parameter names
        ctx: Any,  # noqa: ANN401
        *grad_outputs: Tensor,
    ) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        # read once: checkpointing gives what it has computed again a single time
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        dz = dbias = None
        # a caller may run the backward pass inside autocast too
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                weight = saved[0] if ctx.kept else dense_base(put_together(saved, ctx.form), ctx.dtype, backend=ctx.backend)
                dz = dy @ weight
            if ctx.needs_input_grad[1]:
                dbias = dy.reshape(-1, dy.shape[-1]).sum(dim=0)
        return dz, dbias, None, None, None
