"""A quantized matrix as numbers again: Codes to a dense (out, in) matrix in its own basis.

    gptq    scale · (code − zero)        computed exactly in float32: a float16 scale times a number of at most 8 bits
    nf4     table[code] · scale          computed in float32

Both are rounded once to the dtype asked for. The layouts are in codes.py. Nothing here leaves the basis of the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested, choose
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.unpack import unpack

OP = "dequantize"

_IN_TRITON = (torch.float32, torch.bfloat16, torch.float16)


def dequantize(codes: Codes, dtype: torch.dtype, *, backend: Requested = "auto") -> Tensor:
    """The dense matrix, the same to the bit from every backend.

    Args:
        codes: On any device.
        dtype: Of the result. Triton writes float32, bfloat16 and float16, and `auto` takes torch for others.
        backend: Which implementation.

    Returns:
        (out, in), contiguous, a tensor of its own.

    Raises:
        KernelError: A backend that this machine does not have, or that does not write this dtype.
    """
    if uses_triton(OP, dtype, codes.device, backend):
        from qwha_cli.kernels import dequantize_triton

        return dequantize_triton.dequantize(codes, dtype)
    return _nf4(codes, dtype) if codes.layout == "nf4" else _gptq(codes, dtype)


def dense_base(base: Codes | Tensor, dtype: torch.dtype, *, backend: Requested = "auto") -> Tensor:
    """A frozen weight (out, in), quantized or not, as a dense one. May be the tensor given: not to be written to."""
    return base.to(dtype) if isinstance(base, Tensor) else dequantize(base, dtype, backend=backend)


def uses_triton(op: str, dtype: torch.dtype, device: torch.device, backend: Requested) -> bool:
    """Whether an op that reads codes runs in Triton, which knows no float64.

    Raises:
        KernelError: `triton` was asked for, and cannot run here or not in this dtype.
    """
    if dtype not in _IN_TRITON:
        if backend == "triton":
            raise KernelError(f"the Triton kernel writes no {dtype}", where=op, remedy="use backend auto or torch")
        return False
    return choose(backend, op=op, device=device).name == "triton"


def _gptq(codes: Codes, dtype: torch.dtype) -> Tensor:
    out_features, in_features = codes.shape
    numbers = unpack(codes.codes.T, bits=codes.bits, count=in_features)
    zeros = unpack(codes.zeros, bits=codes.zero_bits, count=out_features).T
    scales = codes.scales.T
    exact = torch.promote_types(dtype, torch.float32)
    values = numbers.view(out_features, scales.shape[1], -1).to(exact)
    fine = 1 << (codes.zero_bits - codes.bits)
    values.sub_(zeros.unsqueeze(-1) if fine == 1 else zeros.to(exact).div_(fine).unsqueeze(-1))
    values.mul_(scales.unsqueeze(-1))
    return values.view(codes.shape).to(dtype)


def _nf4(codes: Codes, dtype: torch.dtype) -> Tensor:
    """A table look-up of our own: bitsandbytes' CPU kernel returns wrong numbers when a row is no whole number of blocks."""
    count = codes.shape[0] * codes.shape[1]
    pairs = codes.codes.view(-1)
    numbers = torch.stack([pairs >> 4, pairs & 15], dim=-1).view(-1)[:count]
    values = codes.zeros[numbers.int()].view(-1, codes.group_size) * codes.scales.unsqueeze(-1)
    return values.view(codes.shape).to(dtype)
