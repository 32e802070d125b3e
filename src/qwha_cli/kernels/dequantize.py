"""A quantized matrix as numbers again: Codes to a dense (out, in) matrix in its own basis.

    gptq    scale · (code − zero)        computed exactly in float32: a float16 scale times a number of at most 8 bits
    nf4     table[code] · scale          computed in float32

Both are rounded once to the dtype asked for. The layouts are in codes.py. Nothing here leaves the basis of the codes. Of the
layout gptq some rows can be had alone, the same to the bit: of a vocabulary nobody wants all at once.
"""

from __future__ import annotations

import dataclasses

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
        from qwha_cli.kernels import effective_weight_triton

        return effective_weight_triton.dequantized(codes, dtype)
    return _nf4(codes, dtype) if codes.layout == "nf4" else _gptq(codes, dtype)


def dequantize_span(codes: Codes, start: int, stop: int, dtype: torch.dtype, *, backend: Requested = "auto") -> Tensor:
    """Neighbouring rows of the dense matrix.

    Args:
        codes: Of the layout gptq.
        start: The first row, a multiple of 32, where words of zero points begin whatever their width.
        stop: The row behind the last; past the end it is the end.
        dtype: As for `dequantize`.
        backend: As for `dequantize`.

    Returns:
        (stop − start, in), a tensor of its own.

    Raises:
        KernelError: Another layout or start, or a backend as in `dequantize`.
    """
    _check_rows(codes)
    if start % 32:
        raise KernelError(f"a span of rows begins at a multiple of 32, not at {start}", where=OP)
    stop = min(stop, codes.shape[0])
    words = slice(start * codes.zero_bits // 32, -(-stop * codes.zero_bits // 32))
    # views, which only kernels that ask for strides can read: they do not leave this file
    part = dataclasses.replace(
        codes,
        codes=codes.codes[:, start:stop],
        scales=codes.scales[:, start:stop],
        zeros=codes.zeros[:, words],
        shape=(stop - start, codes.shape[1]),
    )
    return dequantize(part, dtype, backend=backend)


def gather_rows(codes: Codes, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Chosen rows of the dense matrix, read from the codes of these rows alone. Never waits for the device.

    Args:
        codes: Of the layout gptq, with zero points that no two bytes share (2, 4 or 8 bits).
        rows: (n,) int64, same device, each in the matrix.
        dtype: Of the result.

    Returns:
        (n, in), a tensor of its own.

    Raises:
        KernelError: Another layout or width.
    """
    _check_rows(codes)
    if 8 % codes.zero_bits:
        raise KernelError(f"rows with zero points of {codes.zero_bits} bits cannot be read alone", where=OP)
    places = rows * codes.zero_bits
    bytes_ = codes.zeros.view(torch.uint8).index_select(1, places // 8)
    zeros = (bytes_ >> (places % 8).to(torch.uint8)) & ((1 << codes.zero_bits) - 1)
    numbers = unpack(codes.codes.index_select(1, rows).T, bits=codes.bits, count=codes.shape[1])
    return _values(codes, numbers, codes.scales.index_select(1, rows).T, zeros.T, dtype)


def row_bounds(base: Codes | Tensor) -> Tensor:
    """The largest magnitude that each row could have by its scales and zeros, whatever its codes are, as kernels compute it.

    Args:
        base: (out, in), quantized, or dense and floating: then the largest that it has.

    Returns:
        (out,) float32.
    """
    if isinstance(base, Tensor):
        return base.float().abs().amax(dim=1)
    if base.layout == "nf4":
        return (base.scales.abs() * base.zeros.abs().amax()).view(base.shape[0], -1).amax(dim=1)
    zeros = unpack(base.zeros, bits=base.zero_bits, count=base.shape[0]).float() / (1 << (base.zero_bits - base.bits))
    scales = base.scales.float()
    return torch.maximum((scales * -zeros).abs(), (scales * ((1 << base.bits) - 1 - zeros)).abs()).amax(dim=0)


def _check_rows(codes: Codes) -> None:
    if codes.layout != "gptq":
        raise KernelError(f"rows of the layout {codes.layout} cannot be read alone", where=OP)


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
    numbers = unpack(codes.codes.T, bits=codes.bits, count=codes.shape[1])
    zeros = unpack(codes.zeros, bits=codes.zero_bits, count=codes.shape[0]).T
    return _values(codes, numbers, codes.scales.T, zeros, dtype)


def _values(codes: Codes, numbers: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (n, in) as numbers, by scales and stored zero points (n, groups) of their rows."""
    exact = torch.promote_types(dtype, torch.float32)
    values = numbers.view(*scales.shape, codes.group_size).to(exact)
    fine = 1 << (codes.zero_bits - codes.bits)
    values.sub_(zeros.unsqueeze(-1) if fine == 1 else zeros.to(exact).div_(fine).unsqueeze(-1))
    values.mul_(scales.unsqueeze(-1))
    return values.view(numbers.shape).to(dtype)


def _nf4(codes: Codes, dtype: torch.dtype) -> Tensor:
    """A table look-up of our own: bitsandbytes' CPU kernel returns wrong numbers when a row is no whole number of blocks."""
    count = codes.shape[0] * codes.shape[1]
    pairs = codes.codes.view(-1)
    numbers = torch.stack([pairs >> 4, pairs & 15], dim=-1).view(-1)[:count]
    values = codes.zeros[numbers.int()].view(-1, codes.group_size) * codes.scales.unsqueeze(-1)
    return values.view(codes.shape).to(dtype)
