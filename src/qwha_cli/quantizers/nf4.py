"""NF4: four bits on the quantiles of a normal distribution, one absolute maximum a block. Chosen by bitsandbytes, data-free.

Always quantized on the CPU, so that a digest does not depend on the machine's GPU; the result is bitsandbytes' own flattened
format, without double quantization of the maxima.
"""

from __future__ import annotations

from typing import cast

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qwha_cli.errors import ModelError, NumericsError
from qwha_cli.quant.gram import Gram
from qwha_cli.quant.packed import PackedWeight, QuantizerOptions, check_group

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that bitsandbytes has kernels for."""


def quantize(weight: Tensor, gram: Gram | None, *, options: QuantizerOptions, name: str) -> PackedWeight:
    """Quantize a matrix to NF4.

    Args:
        weight: float32 (out, in), in the basis to be quantized; not written into.
        gram: Not used: the grid is fixed and each weight goes to its nearest value.
        options: group_size is the block size; bits must be 4.
        name: The layer, for errors.

    Returns:
        The codes, on the weight's device.

    Raises:
        ModelError: Other bits than 4, a block size that bitsandbytes does not have or that does not divide the inputs.
        NumericsError: A weight is not finite.
    """
    check_group(name, weight.shape[1], options.group_size)
    if options.bits != 4 or options.group_size not in _BLOCK_SIZES:
        raise ModelError(
            f"nf4 has 4 bits and blocks of {', '.join(map(str, _BLOCK_SIZES))}, not {options.bits} bits and {options.group_size}",
            where=f"layer {name}",
            remedy="set quantize.bits=4 and quantize.group_size to one of these, or use quantize.method=gptq",
        )
    if not bool(torch.isfinite(weight).all()):
        raise NumericsError(
            "a weight is not finite", where=f"layer {name}", remedy="load the model with model.dtype=float32, or check its files"
        )
    codes, state = bnb.quantize_4bit(weight.detach().float().cpu().contiguous(), blocksize=options.group_size, quant_type="nf4")
    tensors = {"weight": codes, "absmax": state.absmax.float(), "quant_map": cast(Tensor, state.code).float()}
    moved = {key: tensor.to(weight.device) for key, tensor in tensors.items()}
    return PackedWeight(moved, options.format, (weight.shape[0], weight.shape[1]))
