"""Codes of 2, 3, 4 or 8 bits in and out of 32-bit words.

A row of codes is one little-endian stream of bits: code j occupies bits b·j to b·j + b − 1, and word w holds bits 32·w to
32·w + 31. For 2, 4 and 8 bits no code straddles two words; for 3 bits, 32 codes fill 3 words and codes 10 and 21 straddle. That
is GPTQ's layout (checkpoint formats `gptq` and `gptq_v2`, not the planar `gptq_p`). A row whose bits do not fill its last word is
padded with zeros. Nothing here knows of scales, groups or orientation: see quant/layout.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwha_cli.errors import KernelError

WIDTHS = (2, 3, 4, 8)
"""The code widths, in bits."""

_WORD = 32


def num_words(count: int, *, bits: int) -> int:
    """How many 32-bit words hold `count` codes of `bits` bits."""
    return -(-count * bits // _WORD)


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Pack each row of codes into 32-bit words.

    Args:
        codes: uint8 (rows, cols), each < 2^bits, any device.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 (rows, ceil(cols · bits / 32)), contiguous, same device.

    Raises:
        KernelError: Another width, dtype or number of dimensions, or a code that does not fit.
    """
    _check_width(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise KernelError(f"codes must be uint8 (rows, cols), got {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise KernelError(f"code {int(codes.max())} does not fit into {bits} bits")
    rows, cols = codes.shape
    # the pattern of shifts repeats after this many codes, which end on a word's edge
    period = 32 if bits == 3 else _WORD // bits
    # int64, because a shifted code may reach beyond 32 bits and int32 shifts into the sign bit are undefined
    parts = F.pad(codes, (0, -cols % period)).long().view(rows, -1, period)
    words = parts.new_zeros(rows, parts.shape[1], period * bits // _WORD)
    for j in range(period):
        word, shift = divmod(j * bits, _WORD)
        words[..., word] |= parts[..., j] << shift
        if shift + bits > _WORD:
            words[..., word + 1] |= parts[..., j] >> (_WORD - shift)
    words = words.view(rows, -1)[:, : num_words(cols, bits=bits)] & 0xFFFFFFFF
    # to two's complement by arithmetic: a narrowing cast of a value out of range is up to the device
    return ((words ^ 0x80000000) - 0x80000000).to(torch.int32)


def unpack(packed: Tensor, *, bits: int, count: int) -> Tensor:
    """Undo `pack`, exactly.

    Args:
        packed: int32 (rows, words), any device.
        bits: 2, 3, 4 or 8.
        count: Codes a row; words = ceil(count · bits / 32).

    Returns:
        uint8 (rows, count), same device.

    Raises:
        KernelError: Another width, dtype or number of dimensions, or a number of words that does not fit `count`.
    """
    _check_width(bits)
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != num_words(count, bits=bits):
        expected = f"int32 (rows, {num_words(count, bits=bits)}) for {count} codes of {bits} bits"
        raise KernelError(f"packed codes must be {expected}, got {packed.dtype} {tuple(packed.shape)}")
    # work on bytes (all platforms of torch are little-endian): a quarter of the memory traffic of 32-bit words
    # a matrix one word wide counts as contiguous whatever its strides, and is no stream of bytes then
    whole = packed.contiguous() if packed.stride(-1) == 1 else packed.clone(memory_format=torch.contiguous_format)
    stream = whole.view(torch.uint8)
    if bits == 8:
        return stream[:, :count].contiguous()
    if bits == 3:
        return _unpack_three(stream)[:, :count]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (stream.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count]


def _unpack_three(stream: Tensor) -> Tensor:
    """Codes of a stream of 3-bit codes given as bytes (rows, bytes): every 3 bytes hold 8 codes."""
    triples = F.pad(stream, (0, -stream.shape[1] % 3)).view(stream.shape[0], -1, 3).int()
    joined = triples[..., 0] | (triples[..., 1] << 8) | (triples[..., 2] << 16)
    shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=stream.device)
    return ((joined.unsqueeze(-1) >> shifts) & 7).to(torch.uint8).view(stream.shape[0], -1)


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise KernelError(f"no packing of {bits}-bit codes, only of {', '.join(map(str, WIDTHS))}")
