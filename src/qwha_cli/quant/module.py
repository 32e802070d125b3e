"""What every module with packed codes does alike: hold them as buffers, whatever happens to the model, and give them to kernels.

It has no parameters. The tensors of its PackedWeight are buffers under the same names, so the state dict is the checkpoint.
Scales keep their dtype whatever `model.to(dtype)` says: rounding them to bfloat16 would move every weight off the grid that was
chosen for it. What is computed from the codes is up to the modules derived from it (linear.py, embedding.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize
from qwha_cli.quant.layout import NAMES
from qwha_cli.quant.packed import Basis, PackedWeight, QuantFormat, check_group


class PackedModule(nn.Module):
    """A module around a quantized matrix. Its codes are uninitialised until loaded, or put there by `take`.

    Args:
        shape: (out, in) of the matrix.
        format: How the codes are stored.
        device: Of the buffers.
        owned: Whether the codes are this module's own; else it has no buffers, and `source` says whose they are.

    Attributes:
        backend: Which implementation makes the codes dense.

    Raises:
        ModelError: The inputs are no whole number of groups.
    """

    def __init__(
        self, shape: tuple[int, int], *, format: QuantFormat, device: torch.device | str | None = None, owned: bool = True
    ) -> None:
        super().__init__()
        check_group(f"({shape[0]}, {shape[1]})", shape[1], format.group_size)
        self.shape = shape
        self.format = format
        self.backend: Requested = "auto"
        for name, (size, kind) in format.shapes(shape).items() if owned else ():
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device))
        self._keep_dense = False
        # plain attributes: neither in the state dict nor moved with the module
        self._dense: Tensor | None = None
        self._codes: Codes | None = None

    def take(self, packed: PackedWeight) -> None:
        """Let the module have these codes; their tensors are shared, not copied."""
        for name, tensor in packed.tensors.items():
            setattr(self, name, tensor)
        self._dense = None

    @property
    def source(self) -> PackedModule:
        """The module whose buffers the codes are."""
        return self

    @property
    def basis(self) -> Basis:
        """What the codes stand for."""
        return self.format.basis

    @property
    def keep_dense(self) -> bool:
        """Whether the dense weight is kept from one use to the next: fast, at the memory of an unquantized layer."""
        return self._keep_dense

    @keep_dense.setter
    def keep_dense(self, keep: bool) -> None:
        self._keep_dense = keep
        self._dense = None

    def packed(self) -> PackedWeight:
        """The codes as a value; it shares the buffers."""
        tensors = {name: self.source.get_buffer(name) for name in self.format.shapes(self.shape)}
        return PackedWeight(tensors, self.format, self.shape)

    def codes(self) -> Codes:
        """The codes as kernels read them, the same object until a buffer is replaced; it shares the buffers."""
        found = self._codes
        codes, scales, zeros = (self.source._buffers[name] for name in NAMES[self.format.layout])
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

    def forget(self) -> None:
        """Drop what was made of the buffers: they have been taken away."""
        self._dense = self._codes = None

    def _describe(self) -> str:
        f = self.format
        return f"method={f.method}, bits={f.bits}, group_size={f.group_size}, basis={f.basis}"

    def _own_codes(self) -> dict[str, Tensor]:
        names = self.format.shapes(self.shape) if self.source is self else ()
        return {name: self.get_buffer(name) for name in names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers as nn.Module does, but refuse a change of dtype for the codes' tensors."""
        before = self._own_codes()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        self.forget()
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        """Forget what was made of the codes that are being replaced."""
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)  # pyright: ignore[reportArgumentType]
