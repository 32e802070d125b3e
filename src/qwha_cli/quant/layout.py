"""The two layouts of stored codes: which tensors a quantized matrix has, how they are packed, and what kernels read of them.

`gptq` (GPTQ and RTN; checkpoint format gptq_v2): value = scale · (code − zero), the zero stored as it is. With fine zero points
(zero_bits > bits) zero = stored / 2^(zero_bits − bits), which only qwha reads.
    qweight int32 (ceil(in·bits/32), out)   codes, packed along the inputs
    qzeros  int32 (groups, ceil(out·zero_bits/32)) zero points, packed along the outputs
    scales  float16 (groups, out)
`nf4` (bitsandbytes): value = quant_map[code] · absmax, blocks of group_size in the flattened (out, in) matrix.
    weight uint8 (ceil(out·in/2), 1)   two codes a byte, the first in the high half
    absmax float32 (out·in / group_size,)
    quant_map float32 (16,)
All weights are (out, in). Only shapes and packing here; what a weight is and knows about itself is in packed.py, how it becomes
numbers again in kernels/dequantize.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.kernels.codes import Layout
from qwha_cli.kernels.unpack import num_words, pack, unpack

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

NAMES: dict[Layout, tuple[str, str, str]] = {
    "gptq": ("qweight", "scales", "qzeros"),
    "nf4": ("weight", "absmax", "quant_map"),
}
"""The tensors of a layout that kernels know as codes, scales and zeros."""


def tensor_shapes(layout: Layout, *, shape: tuple[int, int], bits: int, zero_bits: int, group_size: int) -> Shapes:
    """Name, shape and dtype of every tensor that a matrix of `shape` (out, in) has in this layout."""
    out_features, in_features = shape
    if layout == "nf4":
        count = out_features * in_features
        return {
            "weight": ((-(-count // 2), 1), torch.uint8),
            "absmax": ((-(-count // group_size),), torch.float32),
            "quant_map": ((16,), torch.float32),
        }
    groups = in_features // group_size
    return {
        "qweight": ((num_words(in_features, bits=bits), out_features), torch.int32),
        "qzeros": ((groups, num_words(out_features, bits=zero_bits)), torch.int32),
        "scales": ((groups, out_features), torch.float16),
    }


def pack_gptq(codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, zero_bits: int) -> dict[str, Tensor]:
    """Pack integer codes and their grid.

    Args:
        codes: uint8 (out, in).
        scales: float16 (out, groups).
        zeros: float32 (out, groups), multiples of 2^(bits − zero_bits).
        bits: 2, 3, 4 or 8.
        zero_bits: Likewise, at least bits.

    Returns:
        qweight, qzeros, scales as in the module's docstring.
    """
    return {
        "qweight": pack(codes, bits=bits).T.contiguous(),
        "qzeros": pack((zeros.T * (1 << (zero_bits - bits))).round().to(torch.uint8).contiguous(), bits=zero_bits),
        "scales": scales.T.contiguous(),
    }


def unpack_gptq(
    tensors: dict[str, Tensor], *, shape: tuple[int, int], bits: int, zero_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `pack_gptq`: codes uint8 (out, in), scales float16 and zeros float32 (out, groups), contiguous."""
    out_features, in_features = shape
    codes = unpack(tensors["qweight"].T, bits=bits, count=in_features)
    zeros = unpack(tensors["qzeros"], bits=zero_bits, count=out_features).T.float() / (1 << (zero_bits - bits))
    return codes.contiguous(), tensors["scales"].T.contiguous(), zeros.contiguous()
