"""A linear layer with so many outputs that its weight is never dense as a whole: the head of a vocabulary in codes.

    y = z Q̂ᵀ + b,    dz = dy Q̂

The dense head of a 3B model with 128,256 words takes 788 MB, of Gemma's 262,144 words more than the rest of the model. Here some
thousand outputs are made dense at a time, for the product and, anew, for its gradient: 50 MB in bfloat16 at a width of 3072.
Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize_span

# outputs that are dense at once; a multiple of 32, where words of zero points begin
_AT_ONCE = 1 << 13
# below it the dense weight is no larger than what layers of the blocks make
_WIDE = 1 << 16


def is_wide(base: Codes | Tensor) -> bool:
    """Whether a layer does well to compute this way: codes of many outputs, whose rows can be had alone."""
    return isinstance(base, Codes) and base.layout == "gptq" and base.shape[0] > _WIDE


def wide_linear(z: Tensor, base: Codes, *, bias: Tensor | None, backend: Requested = "auto") -> Tensor:
    """Apply the layer; differentiable in z alone.

    Args:
        z: (..., in), floating, in the basis of the codes. Autocast is the caller's to apply.
        base: Q̂ (out, in), of the layout gptq. Read again in the backward pass, so it must not change before.
        bias: (out,), of z's dtype, or None.
        backend: Which implementation makes codes dense.

    Returns:
        (..., out), dtype of z.
    """
    result: Tensor = _WideLinear.apply(z.reshape(-1, z.shape[-1]), base, bias, backend)
    return result.view(*z.shape[:-1], base.shape[0])


def wide_product(z: Tensor, base: Codes, *, backend: Requested = "auto") -> Tensor:
    """The product z Q̂ᵀ, (n, out), without gradients.

    Args:
        z: (n, in), floating.
        base: As for `wide_linear`.
        backend: As for `wide_linear`.
    """
    result = z.new_empty(len(z), base.shape[0])
    for start, stop in _spans(base):
        torch.mm(z, dequantize_span(base, start, stop, z.dtype, backend=backend).mT, out=result[:, start:stop])
    return result


def wide_gradient(dy: Tensor, base: Codes, *, backend: Requested = "auto") -> Tensor:
    """The product dy Q̂, (n, in), dtype of dy.

    Args:
        dy: (n, out), floating.
        base: As for `wide_linear`.
        backend: As for `wide_linear`.
    """
    # in float32: else each of a dozen parts would be rounded with all that came before it
    total = dy.new_zeros(len(dy), base.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
    for start, stop in _spans(base):
        total += dy[:, start:stop] @ dequantize_span(base, start, stop, dy.dtype, backend=backend)
    return total.to(dy.dtype)


def _spans(base: Codes) -> list[tuple[int, int]]:
    return [(start, min(start + _AT_ONCE, base.shape[0])) for start in range(0, base.shape[0], _AT_ONCE)]


class _WideLinear(torch.autograd.Function):
    """The formulas of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, base: Codes, bias: Tensor | None, backend: Requested) -> Tensor:  # noqa: ANN401
        ctx.base, ctx.backend = base, backend
        result = wide_product(z, base, backend=backend)
        return result if bias is None else result.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        (dy,) = grad_outputs
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        # a caller may run the backward pass inside autocast too
        with torch.autocast(dy.device.type, enabled=False):
            return wide_gradient(dy, ctx.base, backend=ctx.backend), None, None, None
