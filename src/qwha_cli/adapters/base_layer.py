"""What an adapter needs to know of the frozen layer under it, be that an nn.Linear or a QuantizedLinear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwha_cli.errors import ModelError
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.effective_weight import Basis
from qwha_cli.quant.linear import QuantizedLinear

BaseLayer = nn.Linear | QuantizedLinear


def checked_base(module: nn.Module) -> BaseLayer:
    """The module itself if an adapter can be put on it.

    Raises:
        ModelError: It is neither a QuantizedLinear nor an nn.Linear with a floating-point weight. Other packages' quantized
            layers inherit from nn.Linear but keep packed integers in `weight`; those are refused too.
    """
    if isinstance(module, QuantizedLinear) or (isinstance(module, nn.Linear) and module.weight.is_floating_point()):
        return module
    raise ModelError(
        f"a {type(module).__name__} cannot take an adapter, only nn.Linear and QuantizedLinear can",
        remedy="leave the layer out with adapter.exclude (exclude_modules in peft)",
    )


def basis_of(base: BaseLayer) -> Basis:
    """The basis that the stored weight is in; an nn.Linear's is the weight basis."""
    return base.basis if isinstance(base, QuantizedLinear) else "weight"


def base_weight(base: BaseLayer, dtype: torch.dtype) -> Tensor:
    """The dense weight (out, in) in its own basis. May be the layer's own tensor: not to be written to."""
    return base.dense(dtype) if isinstance(base, QuantizedLinear) else base.weight.to(dtype)


def base_operand(base: BaseLayer, dtype: torch.dtype) -> Codes | Tensor:
    """What kernels get for the stored weight: codes, or a dense (out, in) tensor, of `dtype` if it is a quantized layer's.

    An nn.Linear's weight is given as it is, so that kernels round its sum with an adapter once.
    """
    return base.operand(dtype) if isinstance(base, QuantizedLinear) else base.weight


def device_of(base: BaseLayer) -> torch.device:
    """Where the layer's weight lies; the CPU for one that is still on the disk, so that its adapter can be made there."""
    # a head that is tied to its embedding has its codes there
    device = next(base.source.buffers()).device if isinstance(base, QuantizedLinear) else base.weight.device
    return torch.device("cpu") if device.type == "meta" else device


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear around a weight (out, in), which is not copied; the bias is, in the weight's dtype."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.device, weight.dtype, copy=True), requires_grad=False)
    return linear
