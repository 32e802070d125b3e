"""A linear layer whose weight is packed codes.

    y = x Q̂ᵀ + b  (basis "weight")    or    y = (x H) Q̂ᵀ + b  (basis "hadamard")

It has no parameters: gradient flows to x, never to the codes. The tensors of its PackedWeight are buffers under the same names,
so the state dict is the checkpoint. Scales keep their dtype whatever `model.to(dtype)` says: rounding them to bfloat16 would move
every weight off the grid that was chosen for it. Forward and backward each make the dense weight, or it is kept: `keep_dense`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize
from qwha_cli.kernels.low_rank import frozen_linear
from qwha_cli.kernels.quant_matmul import quant_matmul, suits
from qwha_cli.kernels.spectral_linear import basis_input, computing_dtype
from qwha_cli.quant.layout import NAMES
from qwha_cli.quant.packed import Basis, PackedWeight, QuantFormat, check_group


class QuantizedLinear(nn.Module):
    """Stands where an nn.Linear stood. Its codes are uninitialised until loaded; `from_packed` makes a filled one.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: Whether it adds a bias; kept as a buffer in its own dtype.
        format: How the codes are stored.
        device: Of the buffers.
        dtype: Of the bias; None for torch's default.

    Attributes:
        backend: Which implementation makes the codes dense.

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
    ) -> None:
        super().__init__()
        check_group(f"({out_features}, {in_features})", in_features, format.group_size)
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self.backend: Requested = "auto"
        for name, (shape, kind) in format.shapes((out_features, in_features)).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self._keep_dense = False
        # a plain attribute: neither in the state dict nor moved with the module
        self._dense: Tensor | None = None
        self._codes: Codes | None = None

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: Tensor | None = None) -> QuantizedLinear:
        """A layer around existing codes, on their device.

        Args:
            packed: The codes; their tensors are shared, not copied.
            bias: (out,) floating, or None; kept in its dtype, detached.
        """
        out_features, in_features = packed.shape
        layer = cls(in_features, out_features, bias=bias is not None, format=packed.format, device="meta")
        device = next(iter(packed.tensors.values())).device
        for name, tensor in packed.tensors.items():
            setattr(layer, name, tensor)
        if bias is not None:
            layer.bias = bias.detach().to(device)
        return layer

    @property
    def basis(self) -> Basis:
        """What the codes stand for."""
        return self.format.basis

    @property
    def keep_dense(self) -> bool:
        """Whether the dense weight is kept between forwards: fast, at the memory of an unquantized layer."""
        return self._keep_dense

    @keep_dense.setter
    def keep_dense(self, keep: bool) -> None:
        self._keep_dense = keep
        self._dense = None

    def packed(self) -> PackedWeight:
        """The codes as a value; it shares the buffers."""
        shape = (self.out_features, self.in_features)
        return PackedWeight({name: self.get_buffer(name) for name in self.format.shapes(shape)}, self.format, shape)

    def codes(self) -> Codes:
        """The codes as kernels read them, the same object until a buffer is replaced; it shares the buffers."""
        found = self._codes
        codes, scales, zeros = (self._buffers[name] for name in NAMES[self.format.layout])
        if found is None or found.codes is not codes or found.scales is not scales or found.zeros is not zeros:
            found = self._codes = self.packed().as_codes()
        return found

    def operand(self, dtype: torch.dtype) -> Codes | Tensor:
        """What a kernel gets for Q̂: the codes, or the dense weight of this dtype where that is kept."""
        return self.dense(dtype) if self._keep_dense else self.codes()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Q̂ (out, in) in its own basis. Do not write into it: it may be the kept one."""
        if not self._keep_dense:
            return dequantize(self.codes(), dtype, backend=self.backend)
        if self._dense is None or self._dense.dtype != dtype:
            # a tensor made under inference_mode could never take part in training afterwards
            with torch.inference_mode(False), torch.no_grad():
                self._dense = dequantize(self.codes(), dtype, backend=self.backend)
        return self._dense

    def weight_in_weight_basis(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in) that multiplies the untransformed input."""
        return self.packed().in_weight_basis(dtype)

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
        f = self.format
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"method={f.method}, bits={f.bits}, group_size={f.group_size}, basis={f.basis}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move the buffers as nn.Module does, but refuse a change of dtype for all but the bias."""
        before = self.packed().tensors
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        self._dense = None
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        """Forget the dense weight of the codes that are being replaced."""
        self._dense = None
        super()._load_from_state_dict(*args, **kwargs)  # pyright: ignore[reportArgumentType]
