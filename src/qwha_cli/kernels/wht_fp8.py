"""The transform for those who read nothing of it but 8-bit numbers: written as such in its own pass over memory.

    z = x H        row i as s_i z₈,  ‖x_i‖ ≤ 448 s_i

H is orthonormal, so no entry of a row's transform is larger than the row's Euclidean norm, which is known when the row is read,
before any entry of the transform is. A scale from it is looser than one from the largest entry, by some four powers of two, and
e4m3 has those to spare: of a Gaussian row the few numbers below a 250th of the usual size lose a bit of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwha_cli.kernels.backend import Requested, choose
from qwha_cli.kernels.fp8 import OP as FP8
from qwha_cli.kernels.fp8 import Fp8Matrix
from qwha_cli.kernels.hadamard import plan
from qwha_cli.kernels.shared_fp8 import known_as
from qwha_cli.kernels.stand_in import nothing
from qwha_cli.kernels.wht import choose_transform, wht
from qwha_cli.kernels.wht_tiles import fused_tiles_for


def wht_fp8(x: Tensor, *, backend: Requested = "auto") -> Tensor:
    """The transform of x, its 8-bit form known where the kernel can write it.

    Args:
        x: (..., n), floating.
        backend: Which implementation, as for `wht`.

    Returns:
        (..., n), dtype and device of x: a tensor without numbers of which `shared_fp8` gives the form; or, where Triton does not
        run or transforms a row in blocks, the transform itself.

    Raises:
        KernelError: As `wht`.
    """
    size = x.shape[-1]
    fast = choose_transform(backend, size=size, dtype=x.dtype, device=x.device).name == "triton"
    if not (fast and plan(size).block == size and choose("auto", op=FP8, device=x.device).name == "triton"):
        return wht(x, backend=backend)
    from qwha_cli.kernels import wht_triton

    form = Fp8Matrix(*wht_triton.wht_fp8(x.detach(), tiles=fused_tiles_for("transform", size, fp8=True)))
    if torch.is_grad_enabled() and x.requires_grad:
        promised: Tensor = _Promised.apply(x, backend)
        return known_as(form, promised)
    return known_as(form, nothing(x.shape, x.dtype, x.device))


class _Promised(torch.autograd.Function):
    """What stands for x H, which was computed besides; dx = dz Hᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: Requested) -> Tensor:  # noqa: ANN401
        ctx.backend = backend
        return nothing(x.shape, x.dtype, x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401  # pyright: ignore
        return wht(grad_outputs[0], transpose=True, backend=ctx.backend), None
