"""What every adapted linear layer does alike, whatever its adapter: keep the frozen layer, merge into it, cache the sum.

A kind of adapter derives from it and says which adapters it holds, how they are computed and what they add to the weight. What is
derived from tensors (evaluation weights) is kept outside the module tree, see derived.py: peft writes whatever hangs on a tuner
layer beside `base_layer` into the adapter's file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from qwha_cli.adapters.base_layer import base_operand, base_weight, basis_of, checked_base, dense_linear, device_of
from qwha_cli.adapters.derived import Derived
from qwha_cli.errors import NumericsError
from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.effective_weight import Basis
from qwha_cli.kernels.spectral_linear import Keep
from qwha_cli.quant.linear import QuantizedLinear

_PEFT_PREFIX = "base_model.model."  # what PeftModel puts in front of the base's module names


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """A frozen nn.Linear or QuantizedLinear plus any number of named adapters, of which the active ones add up.

    Args:
        base_layer: The layer to adapt; it is kept as it is, bias included.

    Attributes:
        keep: Whether every pass computes the dense weight again ("memory"), the backward pass finds that of the last forward
            pass ("block": with checkpointing, of a block's recomputation; without, of all layers), or all passes find it kept
            until values change ("speed").
        backend: Which implementation of the kernels the layer asks for.
        fp8: Whether a sparse adapter's products are of 8-bit numbers: see fp8.py for where that may be set.
        merge_dtype: Of the dense weight that a quantized layer makes way for when adapters are merged.

    Raises:
        ModelError: The layer is neither an nn.Linear with a floating-point weight nor a QuantizedLinear.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = checked_base(base_layer)
        self.in_features: int = self.base_layer.in_features
        self.out_features: int = self.base_layer.out_features
        self.keep: Keep = "memory"
        self.backend: Requested = "auto"
        self.fp8 = False
        self.merge_dtype = torch.float32
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._caching = False
        # dense, or in 8 bits as two matrices
        self._weights: Derived[Any] = Derived()
        self._codes: list[QuantizedLinear] = []

    # ---- what a kind of adapter says

    def holds(self, adapter_name: str) -> bool:
        """Whether the layer has an adapter of that name."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What one adapter adds to the weight: float32 (out, in), in the weight basis."""
        raise NotImplementedError

    def merged_weight(self, dtype: torch.dtype, *, adapter_names: list[str] | None = None) -> Tensor:
        """The weight with adapters added, computed in float32.

        Args:
            dtype: Of the result.
            adapter_names: Which adapters; by default the active ones.

        Returns:
            (out, in) in the weight basis; never the layer's own tensor.
        """
        raise NotImplementedError

    def renew_kept(self) -> None:
        """Compute the weights that keep="speed" has kept again, where they lie, if values have changed since."""

    def forget_kept(self) -> None:
        """Drop the weights that keep="speed" has kept, but not those that `cache_weights` wants."""
        if self.training or not self._caching:
            self._weights.clear()

    # ---- the frozen layer

    @property
    def basis(self) -> Basis:
        """The basis that the base's stored weight is in."""
        return basis_of(self.base_layer)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the adapter only adds to the weight, so peft's conversion to LoRA applies."""
        return True

    def _base(self, dtype: torch.dtype) -> Codes | Tensor:
        return base_operand(self.base_layer, dtype)

    def _base_weight(self, dtype: torch.dtype) -> Tensor:
        return base_weight(self.base_layer, dtype)

    def _in_use(self) -> tuple[str, ...]:
        if self.disable_adapters or self.merged:
            return ()
        return tuple(name for name in self.active_adapters if self.holds(name))

    def _delta(self, names: Sequence[str]) -> Tensor:
        return reduce(torch.add, [self.get_delta_weight(name) for name in names])

    # ---- merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters into the base's weight; the layer computes the same without them afterwards.

        An nn.Linear is changed in place, in its own dtype. Codes cannot hold the sum: a QuantizedLinear makes way for an
        nn.Linear of `merge_dtype` that holds its dequantized weight and bias, and comes back with `unmerge`.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Which adapters; by default the active ones.

        Raises:
            NumericsError: `safe_merge` is set and the merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.holds(name)]
        if not names:
            return
        base = self.base_layer
        dtype = self.merge_dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
        weight = self.merged_weight(dtype, adapter_names=names)
        if safe_merge and not torch.isfinite(weight).all():
            raise NumericsError(f"the merged weight of adapter {', '.join(names)} has values that are not finite")
        if isinstance(base, QuantizedLinear):
            self._codes = [base]
            self.base_layer = dense_linear(weight, base.bias)
        else:
            base.weight.data = weight
        self.merged_adapters.extend(names)
        self._forget()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged adapters out again: exact for a quantized base, to rounding for an nn.Linear."""
        if not self.merged:
            return
        if self._codes:
            self.base_layer = self._codes.pop().to(device_of(self.base_layer))
        else:
            weight = self._own_weight()
            weight.data = (weight.float() - self._delta(self.merged_adapters)).to(weight.dtype)
        self.merged_adapters.clear()
        self._forget()

    def _own_weight(self) -> Tensor:
        assert isinstance(self.base_layer, nn.Linear)
        return self.base_layer.weight

    # ---- housekeeping

    def cache_weights(self, on: bool) -> None:
        """Keep the dense sum of base and adapters between forward passes in eval mode, one copy a dtype.

        Costs the memory of the dense weight and makes generation fast. Dropped on train(), on a device move, on load, and
        whenever values change; never used while gradients to the values are wanted, never saved.

        Args:
            on: Switch on or off; off frees the memory.
        """
        self._caching = on
        self._weights.clear()

    def train(self, mode: bool = True) -> AdaptedLinear:
        """As nn.Module.train; drops the weights that `cache_weights` keeps in eval mode, but not those of keep="speed"."""
        # a validation between two steps must not move what recorded passes read
        if self.keep != "speed" and (mode or not self._caching):
            self._weights.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        self._forget()
        return super()._apply(fn, recurse)

    def _forget(self) -> None:
        self._weights.clear()


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """All adapted layers by the full module name that they have in the base model.

    Args:
        model: A PeftModel, the tuner in it, or a transformers model with injected adapters.
    """
    return {
        name.removeprefix("_orig_mod.").removeprefix(_PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }
