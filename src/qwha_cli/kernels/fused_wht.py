"""What stands before a transform in a decoder block, done in the transform's own pass over memory.

    norm_wht:  h = x + add,  z = (w ⊙ h / rms(h)) H,  rms(h)² = mean(h²) + ε        gate_wht:  z = (silu(gate) ⊙ up) H

A norm, or a gated activation, reads and writes its rows as often as the transform behind it does, and nobody else reads what lies
between the two. Neither is written to memory here. With r = 1 / rms(h) and dy = dz Hᵀ, the gradient of the first is

    dh = r w ⊙ dy − r² h ⟨dz, z⟩ / n    since ⟨dy, w ⊙ h⟩ r = ⟨dy, y⟩ = ⟨dz, z⟩, H being orthonormal,

so the sum over a row that a norm's gradient needs is taken while dz is read, and one pass is enough. A caller that adds h on to
something later gets h back as a second result, and its gradient is added in the same pass. Weights w are constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Choice, Requested, choose
from qwha_cli.kernels.effective_weight import transform_backend
from qwha_cli.kernels.fp8 import Fp8Matrix
from qwha_cli.kernels.gradient_chain import mark_takes_parts, parts_of
from qwha_cli.kernels.hadamard import plan
from qwha_cli.kernels.shared_fp8 import known_as
from qwha_cli.kernels.stand_in import nothing
from qwha_cli.kernels.wht import wht
from qwha_cli.kernels.wht_tiles import unfit

OP = "fused_wht"


def norm_wht(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    add: Tensor | None = None,
    fp8: bool = False,
    backend: Requested = "auto",
) -> tuple[Tensor, Tensor]:
    """The transform of an RMS norm, and the sum that was normed.

    Args:
        x: (..., n), floating.
        weight: (n,), floating; gets no gradient.
        eps: ε, added to the mean of squares.
        dtype: Of z.
        add: (..., n), shape and dtype of x, added to x first; None for nothing.
        fp8: Whether nothing but z's 8-bit form will be read (shared_fp8.py): in Triton z has no other numbers then.
        backend: Which implementation; `auto` takes torch where `choose_fused` says so.

    Returns:
        z (..., n) of `dtype`, and h (..., n) of x's dtype, which is x itself without `add`; do not write into it. In torch,
        the norm is computed in float32 at least, and rounded to `dtype` before the transform.

    Raises:
        KernelError: Shapes that do not fit, or `triton` asked for where the kernel does not run.
    """
    if weight.shape != x.shape[-1:] or (add is not None and (add.shape != x.shape or add.dtype != x.dtype)):
        raise KernelError(f"weights {tuple(weight.shape)} for rows {tuple(x.shape)} {x.dtype}, or an unlike add", where=OP)
    weight = weight.detach()
    if choose_fused(backend, size=x.shape[-1], dtype=dtype, device=x.device).name == "triton":
        if torch.is_grad_enabled() and (x.requires_grad or (add is not None and add.requires_grad)):
            z, h, *form = _NormWht.apply(x, add, weight, eps, dtype, fp8)  # pyright: ignore[reportGeneralTypeIssues]
            if fp8:
                mark_takes_parts(known_as(Fp8Matrix(*form), z))
            return z, h
        from qwha_cli.kernels import fused_wht_triton

        found, h, _ = fused_wht_triton.norm_forward(x, add, weight, eps=eps, dtype=dtype, fp8=fp8)
        return _named(found, x, dtype), h
    h = x if add is None else x + add
    exact = h.to(torch.promote_types(h.dtype, torch.float32))
    normed = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps) * weight.to(exact.dtype)
    return wht(normed.to(dtype), backend=transform_backend(backend)), h


def gate_wht(
    gate: Tensor,
    up: Tensor,
    *,
    dtype: torch.dtype,
    fp8: bool = False,
    backend: Requested = "auto",
) -> Tensor:
    """The transform of a gated activation, (silu(gate) ⊙ up) H.

    In Triton the gradients are written where `gate` and `up` lie, which nobody else reads after the forward pass of a block: a
    second backward pass over the same graph is refused.

    Args:
        gate: (..., n), floating.
        up: (..., n), shape and dtype of gate.
        dtype: Of the result.
        fp8: Whether nothing but the result's 8-bit form will be read, as for `norm_wht`.
        backend: Which implementation; `auto` takes torch where `choose_fused` says so.

    Returns:
        (..., n) of `dtype`. In torch, the activation is computed in float32 at least, and rounded before the transform.

    Raises:
        KernelError: Shapes or dtypes that differ, or `triton` asked for where the kernel does not run.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise KernelError(f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}", where=OP)
    if choose_fused(backend, size=gate.shape[-1], dtype=dtype, device=gate.device).name == "triton":
        if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
            z, *form = _GateWht.apply(gate, up, dtype, fp8)  # pyright: ignore[reportGeneralTypeIssues]
            return known_as(Fp8Matrix(*form), z) if fp8 else z
        from qwha_cli.kernels import gate_wht_triton

        return _named(gate_wht_triton.gate_forward(gate, up, dtype=dtype, fp8=fp8), gate, dtype)
    exact = torch.promote_types(gate.dtype, torch.float32)
    product = torch.nn.functional.silu(gate.to(exact)) * up.to(exact)
    return wht(product.to(dtype), backend=transform_backend(backend))


def choose_fused(requested: Requested, *, size: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """Choose the backend for rows of `size` numbers whose transform is of `dtype`.

    Raises:
        KernelError: `triton` was asked for and this machine, size or dtype does not have it.
    """
    return choose(requested, op=OP, device=device, lacking=lambda: _lacking(size, dtype))


def _named(z: Tensor | Fp8Matrix, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A transform of x, or a tensor without numbers that stands for its 8-bit form."""
    return z if isinstance(z, Tensor) else known_as(z, nothing(x.shape, dtype, x.device))


def _outputs(ctx: Any, z: Tensor | Fp8Matrix, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:  # noqa: ANN401
    """The transform as a function gives it back, or what stands for it; and the tensors of its 8-bit form, if it has that."""
    if isinstance(z, Tensor):
        return z, ()
    ctx.mark_non_differentiable(z.values, z.scales)
    return nothing(x.shape, dtype, x.device), (z.values, z.scales)


def _lacking(size: int, dtype: torch.dtype) -> str | None:
    # what is not divided by the row's norm yet may leave the range of float16
    if dtype != torch.bfloat16:
        return f"the Triton kernel of {OP} computes no {dtype}"
    if plan(size).block != size:
        return f"a row of {size} is transformed in blocks, and its norm is that of the whole row"
    return unfit(size, dtype)


class _NormWht(torch.autograd.Function):
    """The formulas of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        add: Tensor | None,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        fp8: bool,
    ) -> tuple[Tensor, ...]:
        from qwha_cli.kernels import fused_wht_triton

        found, h, scales = fused_wht_triton.norm_forward(x, add, weight, eps=eps, dtype=dtype, fp8=fp8)
        z, form = _outputs(ctx, found, x, dtype)
        ctx.added = add is not None
        # h is often read no further, z not always
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h if ctx.added else x, weight, scales, *(form or (z,)))
        return z, h if ctx.added else x.view_as(x), *form

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        from qwha_cli.kernels import fused_wht_triton

        dz, dh = grad_outputs[:2]
        total = dh
        if dz is not None:
            h, weight, scales, *z = ctx.saved_tensors
            z = Fp8Matrix(*z) if len(z) == 2 else z[0]
            total = fused_wht_triton.norm_backward(parts_of(dz), z, h, weight, scales, dh)
        return total, total if ctx.added else None, None, None, None, None


class _GateWht(torch.autograd.Function):
    """dgate and dup from dh = dz Hᵀ, σ the logistic function: dh ⊙ up ⊙ σ (1 + gate (1 − σ)) and dh ⊙ gate ⊙ σ."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, dtype: torch.dtype, fp8: bool) -> tuple[Tensor, ...]:  # noqa: ANN401
        from qwha_cli.kernels import gate_wht_triton

        found = gate_wht_triton.gate_forward(gate, up, dtype=dtype, fp8=fp8)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)
        z, form = _outputs(ctx, found, gate, dtype)
        return z, *form

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        from qwha_cli.kernels import gate_wht_triton

        if grad_outputs[0] is None:
            return None, None, None, None
        # once: checkpointing hands out what it computed again a single time
        saved: tuple[Tensor, Tensor] = ctx.saved_tensors
        gate, up = gate_wht_triton.gate_backward(grad_outputs[0], *(tensor.detach() for tensor in saved))
        # a second pass would read gradients as activations: autograd refuses it now
        torch.autograd.graph.increment_version(saved)
        return gate if ctx.needs_input_grad[0] else None, up if ctx.needs_input_grad[1] else None, None, None
