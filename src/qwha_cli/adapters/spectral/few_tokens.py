"""The layer's output for a few tokens while generating: straight from the codes, which is all that a token is to wait for."""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.effective_weight import Basis, Transform
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.quant_matmul import quant_matmul
from qwha_cli.kernels.spectral_linear import basis_input


def few_tokens(
    x: Tensor,
    base: Codes,
    values: Tensor,
    places: Places,
    scale: float,
    *,
    basis: Basis,
    transform: Transform,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: Requested,
) -> Tensor:
    """Apply the layer, without gradients.

    Args:
        x: (..., in), as many tokens as `quant_matmul.suits` says.
        base: Q̂ (out, in).
        values: (nnz,), the entries of F.
        places: Where they lie.
        scale: Factor of the adapter.
        basis: Of the codes.
        transform: Of the adapter.
        bias: (out,) or None.
        dtype: In which it is computed.
        backend: Which implementation.

    Returns:
        (..., out), of dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        z = basis_input(x, dtype, basis=basis, backend=backend).reshape(-1, base.shape[1])
        spectral = z
        if basis == "weight" and transform == "wht":
            spectral = basis_input(x, dtype, basis="hadamard", backend=backend).reshape(-1, base.shape[1])
        how = {"places": places, "values": values, "scale": scale, "sparse_input": spectral, "bias": bias}
        y = quant_matmul(z, base, **how, backend=backend)  # pyright: ignore[reportArgumentType]
    return y.view(*x.shape[:-1], base.shape[0])
