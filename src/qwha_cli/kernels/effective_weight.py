"""The dense weight that base and sparse adapter make together, in the base's own basis, and the way back to the values.

basis "hadamard": W = Q̂ + s F.  basis "weight": W = Q̂ + s F Hᵀ (paper §3.1: ΔW = F H⁻¹). With the identity transform the second
is W = Q̂ + s F as well. Backward: dF = s dW, or s dW H, read at F's places. Where F is added as it is, the base is computed in
float32 at least, the sum is rounded once, and Triton writes no dense base to memory.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dense_base, uses_triton
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.wht import wht

OP = "effective_weight"

Basis = Literal["weight", "hadamard"]
Transform = Literal["wht", "identity"]


def effective_weight(
    base: Codes | Tensor,
    values: Tensor,
    places: Places,
    *,
    basis: Basis,
    scale: float,
    dtype: torch.dtype,
    transform: Transform = "wht",
    backend: Requested = "auto",
) -> Tensor:
    """Base plus adapter; differentiable in `values` and in a dense `base`.

    Args:
        base: Q̂ (out, in) in its own basis, quantized, or dense and floating; not written into.
        values: (nnz,), floating, same device.
        places: Where they lie.
        basis: Where the base's codes live.
        scale: Factor of the adapter.
        dtype: Of the result.
        transform: `identity` leaves out H in the weight basis; the Hadamard basis has none to leave out on this side.
        backend: Which implementation.

    Returns:
        (out, in), of dtype, a tensor of its own.

    Raises:
        KernelError: Shapes that do not fit, or a backend that this machine does not have.
    """
    check_shapes(base, values, places)
    how = (dtype, scale, basis == "hadamard" or transform == "identity", backend)
    if torch.is_grad_enabled() and (values.requires_grad or (isinstance(base, Tensor) and base.requires_grad)):
        result: Tensor = _EffectiveWeight.apply(base, values, places, how)
        return result
    return build_weight(base, values, places, *how)


def check_shapes(base: Codes | Tensor, values: Tensor, places: Places) -> None:
    """Refuse values and a base that do not belong to the places.

    Raises:
        KernelError: They do not.
    """
    if values.numel() != len(places):
        raise KernelError(f"{values.numel()} values for {len(places)} places", where=OP)
    if tuple(base.shape) != places.shape:
        raise KernelError(f"a base {tuple(base.shape)} for places in {places.shape}", where=OP)


def build_weight(
    base: Codes | Tensor, values: Tensor, places: Places, dtype: torch.dtype, scale: float, plain: bool, backend: Requested
) -> Tensor:
    """`effective_weight` without its checks and gradients; `plain` adds F as it is, without H."""
    fast = uses_triton(OP, dtype, values.device, backend)
    if plain:
        return _in_triton(base, values, places, dtype, scale) if fast else _in_torch(base, values, places, dtype, scale)
    if fast:
        spectrum = _in_triton(None, values, places, dtype, scale)
    else:
        flat = torch.zeros(places.shape[0] * places.shape[1], dtype=dtype, device=values.device)
        spectrum = flat.index_add_(0, places.flat_index, _scaled(values, scale, dtype)).view(places.shape)
    dense = dense_base(base, dtype, backend=backend)
    return wht(spectrum, transpose=True, add=dense, backend=transform_backend(backend))


def transform_backend(backend: Requested) -> Requested:
    """What is asked of the transform where `backend` is asked of a layer: not Triton for sizes that its kernel does not take."""
    return "torch" if backend == "torch" else "auto"


def gather_entries(matrix: Tensor, places: Places, *, scale: float, backend: Requested = "auto") -> Tensor:
    """What a matrix holds at F's places, times a factor.

    Args:
        matrix: (out, in), floating.
        places: Where to read, same device.
        scale: The factor.
        backend: Which implementation.

    Returns:
        (nnz,), float32, or float64 from a float64 matrix.

    Raises:
        KernelError: A matrix of another shape, or a backend that this machine does not have.
    """
    if tuple(matrix.shape) != places.shape:
        raise KernelError(f"a matrix {tuple(matrix.shape)} for places in {places.shape}", where=OP)
    if uses_triton(OP, matrix.dtype, matrix.device, backend):
        from qwha_cli.kernels import effective_weight_triton

        return effective_weight_triton.gather(matrix, places, scale=scale)
    found = matrix.reshape(-1).index_select(0, places.flat_index)
    return found.to(torch.promote_types(matrix.dtype, torch.float32)) * scale


def _scaled(values: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Values times the factor, rounded once: a product in bfloat16 would round before."""
    return (values.to(torch.promote_types(values.dtype, torch.float32)) * scale).to(dtype)


def _in_triton(base: Codes | Tensor | None, values: Tensor, places: Places, dtype: torch.dtype, scale: float) -> Tensor:
    from qwha_cli.kernels import effective_weight_triton

    return effective_weight_triton.added(base, values, places, scale=scale, dtype=dtype)


def _in_torch(base: Codes | Tensor, values: Tensor, places: Places, dtype: torch.dtype, scale: float) -> Tensor:
    exact = torch.promote_types(dtype, torch.float32)
    weight = dense_base(base, exact, backend="torch")
    # dequantized codes are ours to write into, the caller's tensor is not
    weight = weight.clone(memory_format=torch.contiguous_format) if weight is base else weight.contiguous()
    weight.view(-1).index_add_(0, places.flat_index, _scaled(values, scale, exact))
    return weight.to(dtype)


class _EffectiveWeight(torch.autograd.Function):
    """The formulas of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, base: Codes | Tensor, values: Tensor, places: Places, how: tuple[Any, ...]) -> Tensor:  # noqa: ANN401
        ctx.places, ctx.how = places, how
        ctx.kinds = (base.dtype if isinstance(base, Tensor) else None, values.dtype)
        return build_weight(base, values, places, *how)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the parameter names
        ctx: Any,  # noqa: ANN401
        *grad_outputs: Tensor,
    ) -> tuple[Tensor | None, ...]:
        (dw,) = grad_outputs
        _, scale, plain, backend = ctx.how
        dbase = dw.to(ctx.kinds[0]) if ctx.needs_input_grad[0] else None
        dvalues = None
        if ctx.needs_input_grad[1]:
            spectrum = dw if plain else wht(dw, backend=transform_backend(backend))
            found = gather_entries(spectrum, ctx.places, scale=scale, backend=backend)
            dvalues = found.to(ctx.kinds[1])
        return dbase, dvalues, None, None
