"""A quantized linear layer whose grid, and on wish whose rounding, are trained: it stands in for a QuantizedLinear for a while.

    Q̂ = s (1 + a) · (c − z)        c = clamp(⌊r⌉)        z rounded to the steps in which it is stored

Trained are a (relative change of the scales), z, and with `rounding` the codes before they are rounded, r, which start where
the weight lies inside its code's interval, so that what nearly fell on the other side can change sides. Rounding passes
gradients straight through (Bengio et al. 2013), clamping only where it does not cut. It is how EfficientQAT's first phase trains
(Chen et al. 2024).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwha_cli.kernels.wht import wht
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import PackedWeight

# how far from its code a weight may start: at a half it would change sides with the first step
_FARTHEST = 0.45
# float16's smallest and largest numbers, within which a scale has to stay to be stored
_SMALLEST_SCALE = 2.0**-24
_LARGEST_SCALE = 65504.0


class TrainableQuantizedLinear(nn.Module):
    """The trainable form of a quantized layer.

    Args:
        layer: The layer; of the integer kind, not nf4. It is not changed.
        weight: The weight (out, in) in the codes' basis, to train the rounding too; None to keep the codes.

    Raises:
        KernelError: The layer is nf4.
    """

    def __init__(self, layer: QuantizedLinear, *, weight: Tensor | None = None) -> None:
        super().__init__()
        codes, scales, zeros = layer.packed().codes()
        self.format = layer.format
        self.basis = layer.basis
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.register_buffer("_scales", scales.float(), persistent=False)
        self.scale_change = nn.Parameter(torch.zeros_like(scales, dtype=torch.float32))
        self.zeros = nn.Parameter(zeros, requires_grad=not layer.format.symmetric)
        grouped = codes.view(*scales.shape, -1).float()
        self.register_buffer("_codes", grouped if weight is None else None, persistent=False)
        self.rounding = nn.Parameter(self._inside(weight, grouped)) if weight is not None else None

    def _inside(self, weight: Tensor, codes: Tensor) -> Tensor:
        """Where each weight lies on its row's grid, moved into the interval of its code."""
        place = weight.to(codes).view_as(codes) / self._of_buffer("_scales").unsqueeze(-1) + self.zeros.detach().unsqueeze(-1)
        return codes + (place - codes).clamp(-_FARTHEST, _FARTHEST)

    def _of_buffer(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, name))

    def learning_rates(self, *, grid: float, rounding: float) -> list[tuple[nn.Parameter, float]]:
        """The parameters, each with its learning rate: relative for scales, in codes for zeros and roundings."""
        found = [
            (self.scale_change, grid),
            (self.zeros, grid),
            *([(self.rounding, rounding)] if self.rounding is not None else []),
        ]
        return [(parameter, rate) for parameter, rate in found if parameter.requires_grad]

    def weight(self) -> Tensor:
        """Q̂ float32 (out, in) in its own basis, differentiable in the parameters."""
        codes, scales, zeros = self._grid()
        return ((codes - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).view(self.out_features, self.in_features)

    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, groups, size), scales and zeros (out, groups), as they are used."""
        scales = (self._of_buffer("_scales") * (1 + self.scale_change)).clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
        codes = self._of_buffer("_codes") if self.rounding is None else self.rounding.clamp(0, (1 << self.format.bits) - 1)
        return _rounded(codes, 1.0) if self.rounding is not None else codes, scales, self._used_zeros()

    def _used_zeros(self) -> Tensor:
        step = 2.0 ** (self.format.bits - self.format.zero_bits)
        return _rounded(self.zeros.clamp(0, (1 << self.format.bits) - step), step)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., in), floating, on the layer's device.

        Returns:
            (..., out), dtype of x, or of autocast where it is on.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            z = wht(x) if self.basis == "hadamard" else x
            return F.linear(z, self.weight().to(z.dtype), None if self.bias is None else self.bias.to(z.dtype))

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """The layer's codes and grid as they can be stored; scales are rounded to float16."""
        codes, scales, zeros = self._grid()
        return PackedWeight.from_codes(
            codes.view(self.out_features, self.in_features).to(torch.uint8), scales.to(torch.float16), zeros, format=self.format
        )


def _rounded(values: Tensor, step: float) -> Tensor:
    """The nearest multiples of a step, whose gradient is that of the values themselves."""
    return values + ((values / step).round() * step - values).detach()
