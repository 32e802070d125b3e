"""A quantized matrix, and a sparse one beside it, times the inputs of a few tokens: what generation asks of a layer.

    y = z Q̂ᵀ + s u Fᵀ + b        z (tokens, in) in the basis of the codes; u = z, or x H where the codes are in the weight basis

With so few tokens all time goes into reading the matrix, so nothing may be read but codes and entries: the dense weight is never
made. One token's products meet a group's scale and zero as sums: Σ z_k scale (c_k − zero) = scale (Σ z_k c_k − zero Σ z_k).
In torch the dense weight is made after all: that form is the reference, and right on every device. No gradients: training goes
through spectral_linear.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested, choose
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.sparse_matmul import sparse_matmul

OP = "quant_matmul"
MAX_TOKENS = 16
"""With more tokens the dense weight costs less than reading inputs again and again."""


def quant_matmul(
    z: Tensor,
    base: Codes,
    *,
    places: Places | None = None,
    values: Tensor | None = None,
    scale: float = 1.0,
    sparse_input: Tensor | None = None,
    bias: Tensor | None = None,
    backend: Requested = "auto",
) -> Tensor:
    """Multiply a few tokens by codes and sparse entries.

    Args:
        z: (tokens, in), 1 to 16 tokens, float16, bfloat16 or float32 (torch: any float), on the device of all other tensors.
        base: Q̂ (out, in).
        places: Where F (out, in) has entries; None for no F.
        values: (nnz,) floating, F's entries; bfloat16 ones are a third fewer bytes to read than float32.
        scale: s.
        sparse_input: u (tokens, in), dtype of z; None for z itself.
        bias: (out,) floating, or None.
        backend: Which implementation. `auto` takes torch for what Triton's lacks: float64, nf4 in rows or blocks of odd length.

    Returns:
        (tokens, out), dtype of z; Triton sums in float32, in the same order each time, and rounds once.

    Raises:
        KernelError: Shapes, dtypes or a number of tokens that do not fit, gradients are wanted, or a backend that this machine
            does not have.
    """
    _check(z, base, places, values, sparse_input, bias)
    sparse = None if places is None or values is None or not len(places) else (places, values)
    u = z if sparse_input is None else sparse_input
    lacking = _lacking(z.dtype, base)
    if backend == "triton" and lacking:
        raise KernelError(f"the Triton kernel does not take {lacking}", where=OP, remedy="use backend auto or torch")
    if not lacking and choose(backend, op=OP, device=z.device).name == "triton":
        from qwha_cli.kernels import quant_matmul_triton

        return quant_matmul_triton.quant_matmul(z, u, base, sparse, scale=scale, bias=bias)
    result = torch.nn.functional.linear(z, dequantize(base, z.dtype, backend="torch"), None if bias is None else bias.to(z.dtype))
    if sparse is None:
        return result
    return result + sparse_matmul(u, sparse[0].with_values(sparse[1])) * scale


def suits(x: Tensor, base: Codes | Tensor, dtype: torch.dtype, backend: Requested) -> bool:
    """Whether a layer does well to compute this way: few tokens, codes, no gradient wanted, and the Triton kernel there.

    Args:
        x: (..., in), the layer's input.
        base: Its base.
        dtype: In which it computes.
        backend: What is asked of the layer.
    """
    return (
        not torch.is_grad_enabled()
        and isinstance(base, Codes)
        and 0 < x.numel() <= _most_tokens(base) * x.shape[-1]
        and _lacking(dtype, base) is None
        and choose(backend, op=OP, device=x.device).name == "triton"
    )


def _most_tokens(base: Codes) -> int:
    # more tokens of NF4 take 1.4 to 2.2 times as long as making the weight and an ordinary product (H100; docs/results/speed.md)
    return 1 if base.layout == "nf4" else MAX_TOKENS


def _check(
    z: Tensor, base: Codes, places: Places | None, values: Tensor | None, sparse_input: Tensor | None, bias: Tensor | None
) -> None:
    out_features, in_features = base.shape
    if z.dim() != 2 or z.shape[1] != in_features or not 1 <= z.shape[0] <= MAX_TOKENS:
        raise KernelError(f"inputs of 1 to {MAX_TOKENS} tokens x {in_features} are needed, got {tuple(z.shape)}", where=OP)
    if sparse_input is not None and (sparse_input.shape != z.shape or sparse_input.dtype != z.dtype):
        raise KernelError(
            f"inputs of F must be {z.dtype} {tuple(z.shape)}, got {sparse_input.dtype} {tuple(sparse_input.shape)}", where=OP
        )
    if (places is None) != (values is None):
        raise KernelError("places and values go together", where=OP)
    if places is not None and values is not None and (places.shape != base.shape or values.shape != (len(places),)):
        raise KernelError(
            f"{tuple(values.shape)} values for {len(places)} places of {places.shape} beside codes of {base.shape}", where=OP
        )
    if bias is not None and bias.shape != (out_features,):
        raise KernelError(f"a bias of {out_features} numbers is needed, got {tuple(bias.shape)}", where=OP)
    wanted = (z, values, sparse_input, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in wanted):
        raise KernelError("there are no gradients here", where=OP, remedy="use torch.no_grad(), or spectral_linear to train")


def _lacking(dtype: torch.dtype, base: Codes) -> str | None:
    """What the Triton kernel cannot do; None for nothing."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"inputs of {dtype}"
    if base.layout == "nf4" and (base.shape[1] % 2 or base.group_size % 2):
        return f"nf4 with {base.shape[1]} inputs in blocks of {base.group_size}, whose bytes two rows or blocks share"
    return None
