"""The orthonormal Walsh-Hadamard transform of the last dimension: x @ H and x @ Hᵀ, for any size that `plan` accepts.

    out = x H + add        dx = dout Hᵀ        dadd = dout

H_b = (A ⊗ C) / sqrt(b) with A = base ⊗ Sylvester(2^j) and C = Sylvester(2^(k−j)). A row of x seen as an (a, c) matrix X becomes
Aᵀ X C. In torch, a and c are balanced and this is two small dense products, O(n (a + c)), on every device faster than a butterfly
of torch operations; wht_triton.py reads each row once. H_n is never built unless n is small, and nothing is kept for the backward
pass. Sources: paper App. B.1; the Kronecker identity (A ⊗ C)ᵀ vec(X) = vec(Aᵀ X C), row-major.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Choice, Requested, choose
from qwha_cli.kernels.hadamard import base_matrix, plan
from qwha_cli.kernels.wht_tiles import tiles_for, unfit

OP = "wht"
_HALF = (torch.float16, torch.bfloat16)
# below this one dense product is as fast as two
_SMALL_BLOCK = 64


def wht(x: Tensor, *, transpose: bool = False, add: Tensor | None = None, backend: Requested = "auto") -> Tensor:
    """Multiply the last dimension by H (or Hᵀ) and add a tensor to the result.

    Args:
        x: (..., n), floating, any device.
        transpose: Multiply by Hᵀ, which undoes H.
        add: (..., n), shape, dtype and device of x; added in float32 (float64 of float64), before the result is rounded.
        backend: Which implementation; `auto` takes torch for what `wht_tiles.unfit` names, float64 among it.

    Returns:
        (..., n), dtype and device of x. In torch, half precision is computed in float32 on the CPU, and elsewhere in its own
        dtype with the matrix product's float32 accumulation. Autocast changes nothing.

    Raises:
        KernelError: n < 1, an `add` that does not match x, or a backend that this machine, size or dtype does not have.
    """
    if add is not None and (add.shape != x.shape or add.dtype != x.dtype or add.device != x.device):
        raise KernelError(
            f"what is added must be as x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(add.shape)} {add.dtype} on {add.device}",
            where=OP,
        )
    if torch.is_grad_enabled() and (x.requires_grad or (add is not None and add.requires_grad)):
        result: Tensor = _Transform.apply(x, add, transpose, backend)
        return result
    return _transform(x, add, transpose, backend)


def choose_transform(requested: Requested, *, size: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """Choose the backend of the transform of rows of `size` numbers.

    Raises:
        KernelError: `triton` was asked for and this machine, size or dtype does not have it.
    """
    return choose(requested, op=OP, device=device, lacking=lambda: unfit(size, dtype))


def transform_gram(gram: Tensor) -> Tensor:
    """The Gram matrix of transformed inputs: Hᵀ G H, where G = XᵀX and the inputs become X H.

    Args:
        gram: (n, n), symmetric, floating.

    Returns:
        (n, n), dtype and device of gram; symmetric to the last bit.
    """
    both = wht(wht(gram).mT).mT
    return (both + both.mT) / 2


class _Transform(torch.autograd.Function):
    """The formulas of the module's docstring. The backward pass calls `wht` again, so that it can be differentiated too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Tensor | None, transpose: bool, backend: Requested) -> Tensor:  # noqa: ANN401
        ctx.transpose, ctx.backend = transpose, backend
        return _transform(x, add, transpose, backend)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN401
        (grad,) = grad_outputs
        dx = wht(grad, transpose=not ctx.transpose, backend=ctx.backend) if ctx.needs_input_grad[0] else None
        return dx, grad if ctx.needs_input_grad[1] else None, None, None


def _transform(x: Tensor, add: Tensor | None, transpose: bool, backend: Requested) -> Tensor:
    if choose_transform(backend, size=x.shape[-1], dtype=x.dtype, device=x.device).name == "triton":
        from qwha_cli.kernels import wht_triton

        return wht_triton.wht(x, add, transpose=transpose, tiles=tiles_for(x.shape[-1]))
    # a CPU multiplies float32 faster than half precision in matrices this small, and rounds once instead of three times
    dtype = torch.float32 if x.dtype in _HALF and x.device.type == "cpu" else x.dtype
    add = None if add is None else add.to(dtype)
    # meta tensors know no autocast
    if not torch.amp.is_autocast_available(x.device.type):
        return _multiply(x.to(dtype), transpose, add).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _multiply(x.to(dtype), transpose, add).to(x.dtype)


def _multiply(x: Tensor, transpose: bool, add: Tensor | None = None) -> Tensor:
    """The two products, in x's own dtype."""
    left, right, factor = _factors(x.shape[-1], x.dtype, x.device, transpose)
    rows = x.reshape(-1, right.shape[0])
    if right.shape[0] > 1:
        rows = rows @ right
    blocks = rows.reshape(-1, left.shape[0], right.shape[0])
    copies = left.expand(blocks.shape[0], -1, -1)
    # alpha multiplies the float32 sums, and what is added joins them, so that half precision rounds twice and not three times
    start, beta = (blocks.new_zeros(()), 0) if add is None else (add.reshape(blocks.shape), 1)
    return torch.baddbmm(start, copies, blocks, beta=beta, alpha=factor).reshape(x.shape)


@lru_cache(maxsize=128)
def _factors(size: int, dtype: torch.dtype, device: torch.device, transpose: bool) -> tuple[Tensor, Tensor, float]:
    """(L, R, f) so that x becomes f · L X R per block: L (a, a), R (c, c).

    The entries are ± a power of two, so that they are exact in every dtype and half-precision sums stay in range; what the powers
    leave of 1/sqrt(b) is f, between 1/2 and 2.
    """
    chosen = plan(size)
    split = min(range(chosen.log2 + 1), key=lambda j: chosen.base * 2**j + 2 ** (chosen.log2 - j))
    if chosen.block <= _SMALL_BLOCK:
        split = chosen.log2
    with torch.inference_mode(False):
        left = torch.kron(base_matrix(chosen.base), base_matrix(2**split))
        right = base_matrix(2 ** (chosen.log2 - split))
        # x A has the kernel Aᵀ on the left of X; Sylvester's matrix is symmetric
        left = left if transpose else left.mT
        scales = [2.0 ** -(order.bit_length() // 2) for order in (left.shape[0], right.shape[0])]
        scaled = [(m.to(dtype) * s).contiguous().to(device) for m, s in zip((left, right), scales, strict=True)]
    factor = 1 / (math.sqrt(chosen.block) * scales[0] * scales[1])
    return scaled[0], scaled[1], factor
