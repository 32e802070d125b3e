"""A linear layer whose weight is packed codes.

    y = x Q̂ᵀ + b  (basis "weight")    or    y = (x H) Q̂ᵀ + b  (basis "hadamard")

It has no parameters: gradient flows to x, never to the codes, which are buffers (module.py). Forward and backward each make the
dense weight, or it is kept: `keep_dense`. A vocabulary's is made in parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.low_rank import frozen_linear
from qwha_cli.kernels.quant_matmul import quant_matmul, suits
from qwha_cli.kernels.spectral_linear import basis_input, computing_dtype
from qwha_cli.kernels.wide_linear import is_wide, wide_linear
from qwha_cli.quant.module import PackedModule
from qwha_cli.quant.packed import PackedWeight, QuantFormat


class QuantizedLinear(PackedModule):
    """Stands where an nn.Linear stood. Its codes are uninitialised until loaded; `from_packed` makes a filled one.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: Whether it adds a bias; kept as a buffer in its own dtype.
        format: How the codes are stored.
        device: Of the buffers.
        dtype: Of the bias; None for torch's default.
        owned: Whether the codes are this layer's own, see PackedModule.

    Raises:
        ModelError: The inputs are no whole number of groups.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        format: QuantFormat,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        owned: bool = True,
    ) -> None:
        super().__init__((out_features, in_features), format=format, device=device, owned=owned)
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: Tensor | None = None) -> QuantizedLinear:
        """A layer around existing codes, on their device.

        Args:
            packed: The codes; their tensors are shared, not copied.
            bias: (out,) floating, or None; kept in its dtype, detached.
        """
        out_features, in_features = packed.shape
        layer = cls(in_features, out_features, bias=bias is not None, format=packed.format, device="meta")
        layer.take(packed)
        if bias is not None:
            layer.bias = bias.detach().to(next(iter(packed.tensors.values())).device)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; differentiable in x.

        Args:
            x: (..., in), floating, on the layer's device.

        Returns:
            (..., out), dtype of x, or of autocast where it is on.
        """
        dtype = computing_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            base = self.operand(dtype)
            if isinstance(base, Codes) and is_wide(base) and self.basis == "weight" and not suits(x, base, dtype, self.backend):
                return wide_linear(
                    x.to(dtype), base, bias=None if self.bias is None else self.bias.to(dtype), backend=self.backend
                )
            if torch.is_grad_enabled() and x.requires_grad:
                # autograd by itself would keep the dense weight of every layer
                return frozen_linear(x.to(dtype), base=base, basis=self.basis, bias=self.bias, backend=self.backend)
            z = basis_input(x, dtype, basis=self.basis, backend=self.backend)
            if isinstance(base, Codes) and suits(x, base, dtype, self.backend):
                y = quant_matmul(z.reshape(-1, self.in_features), base, bias=self.bias, backend=self.backend)
                return y.view(*x.shape[:-1], self.out_features)
            return F.linear(z, self.dense(dtype), None if self.bias is None else self.bias.to(dtype))

    def extra_repr(self) -> str:
        """Sizes and format, for print(model)."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._describe()}"
