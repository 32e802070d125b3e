"""One linear layer with LoRA factors added to its frozen weight: peft's tensors under peft's names, our frozen layer under them.

    y = base(x) + s · (x Aᵀ) Bᵀ        merged  W' = Q̂ + s B A  or  Q̂ Hᵀ + s B A        s = lora_alpha / r

The base is an nn.Linear or packed codes in either basis; B A is in the weight basis always. `lora_A` and `lora_B` hold A (r, in)
and B (out, r), float32 and alone trainable, so that the adapter's file is an ordinary LoRA. peft's own layer does not serve:
it reads and writes `weight`, which packed codes do not have.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from qwha_cli.adapters.adapted_linear import AdaptedLinear
from qwha_cli.adapters.base_layer import device_of
from qwha_cli.errors import ArtifactError, UsageError
from qwha_cli.kernels.low_rank import LowRank, frozen_linear
from qwha_cli.kernels.spectral_linear import basis_input, computing_dtype
from qwha_cli.kernels.wht import wht


class LowRankLinear(AdaptedLinear, LoraLayer):
    """A frozen nn.Linear or QuantizedLinear plus any number of named LoRA adapters, of which the active ones add up.

    peft makes it through `LoraConfig._register_custom_module`, hence the arguments.

    Args:
        base_layer: The layer to adapt; it is kept as it is, bias included.
        adapter_name: Name of the first adapter.
        config: Its configuration. Dropout and rank-stabilised scaling are honoured.
        r: Its rank.
        lora_alpha: Its scale times r.
        **kwargs: What peft tells layers of its own; not used.

    Raises:
        ModelError: The layer is neither an nn.Linear with a floating-point weight nor a QuantizedLinear.
        UsageError: The configuration asks for a bias in B.
        ValueError: It asks for a variant of LoRA, such as DoRA; raised by peft.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
        **kwargs: object,
    ) -> None:
        AdaptedLinear.__init__(self, base_layer)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    # ---- adapters on the layer

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:  # noqa: ANN401
        """Add an adapter, or replace the one of that name; peft's, after a look at what this layer cannot do."""
        if config.lora_bias:
            raise UsageError("this layer has no bias in B", where="LoraConfig.lora_bias", remedy="set it to False")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # pyright: ignore

    def holds(self, adapter_name: str) -> bool:
        """Whether the layer has an adapter of that name."""
        return adapter_name in self.lora_A

    def factors(self, adapter_name: str) -> LowRank:
        """A and B of one adapter as a value, without the scale, detached."""
        return LowRank(self._a(adapter_name).detach(), self._b(adapter_name).detach())

    def set_factors(self, adapter_name: str, factors: LowRank) -> None:
        """Write other factors into an adapter; they become float32 on the layer's device.

        Args:
            adapter_name: Name of the adapter.
            factors: Of the adapter's rank.

        Raises:
            ArtifactError: The shape or the rank is not the layer's.
        """
        found = (*factors.shape, factors.rank)
        wanted = (self.out_features, self.in_features, self.factors(adapter_name).rank)
        if found != wanted:
            raise ArtifactError(f"factors of (out, in, rank) {found} for a layer of {wanted}")
        for holder, factor in ((self.lora_A, factors.a), (self.lora_B, factors.b)):
            linear = cast(nn.Linear, holder[adapter_name])
            # a new tensor: on a base whose codes are still on the disk peft has left the old one without memory
            own = factor.detach().to(device_of(self.base_layer), torch.float32).clone()
            linear.weight = nn.Parameter(own, requires_grad=linear.weight.requires_grad)

    def _a(self, adapter_name: str) -> Tensor:
        return cast(nn.Linear, self.lora_A[adapter_name]).weight

    def _b(self, adapter_name: str) -> Tensor:
        return cast(nn.Linear, self.lora_B[adapter_name]).weight

    # ---- forward

    def forward(self, x: Tensor, *args: object, adapter_names: list[str] | None = None, **kwargs: object) -> Tensor:
        """The base's output with the active adapters added.

        Args:
            x: (..., in), any float dtype; under autocast the computation runs in the autocast dtype.
            *args: Handed to the base layer where it is called.
            adapter_names: One adapter for each item of the batch, as everywhere in peft.
            **kwargs: As `args`.

        Returns:
            (..., out).
        """
        if adapter_names is not None:
            self._check_forward_args(x, adapter_names=adapter_names)
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._in_use()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        x = x.to(computing_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            if self._caching and not self.training and not (torch.is_grad_enabled() and self._trainable(names)):
                return self._forward_cached(x, names)
            y = frozen_linear(
                x,
                base=self._base(x.dtype),
                basis=self.basis,
                bias=self.base_layer.bias,
                keep=self.keep,
                backend=self.backend,
            )
            return reduce(torch.add, [self._update(name, x) for name in names], y)

    def _update(self, name: str, x: Tensor) -> Tensor:
        """S (x Aᵀ) Bᵀ of one adapter, in x's dtype; its gradients arrive in float32."""
        inner = F.linear(self.lora_dropout[name](x), self._a(name).to(x.dtype)) * self.scaling[name]
        return F.linear(inner, self._b(name).to(x.dtype))

    def _forward_cached(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        sources = [factor for name in names for factor in (self._a(name), self._b(name))]
        weight = self._weights.get((x.dtype, names), sources, lambda: self._effective(names, x.dtype))
        bias = self.base_layer.bias
        z = basis_input(x, x.dtype, basis=self.basis, backend=self.backend)
        return F.linear(z, weight, None if bias is None else bias.to(x.dtype))

    def _effective(self, names: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        """Base plus adapters (out, in) in the base's basis, rounded once."""
        exact = torch.promote_types(dtype, torch.float32)
        weight = self._base_weight(exact)
        for name in names:
            # x Aᵀ = (x H)(A H)ᵀ
            a = wht(self._a(name).to(exact)) if self.basis == "hadamard" else self._a(name).to(exact)
            weight = torch.addmm(weight, self._b(name).to(exact), a, alpha=self.scaling[name])
        return weight.to(dtype)

    def _trainable(self, names: tuple[str, ...]) -> bool:
        return any(factor.requires_grad for name in names for factor in (self._a(name), self._b(name)))

    # ---- merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What one adapter adds to the weight: s B A.

        Args:
            adapter: Name of the adapter.

        Returns:
            float32 (out, in) in the weight basis, whatever basis the codes are in; differentiable in the factors.
        """
        return self._b(adapter).float() @ self._a(adapter).float() * self.scaling[adapter]

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype, *, adapter_names: list[str] | None = None) -> Tensor:
        """The weight with adapters added: Q̂ + s B A, or Q̂ Hᵀ + s B A, computed in float32.

        Args:
            dtype: Of the result.
            adapter_names: Which adapters; by default the active ones.

        Returns:
            (out, in) in the weight basis.
        """
        names = self._in_use() if adapter_names is None else adapter_names
        weight = self._base_weight(torch.float32)
        weight = wht(weight, transpose=True) if self.basis == "hadamard" else weight
        return (weight + self._delta(names) if names else weight).to(dtype, copy=True)

    # ---- housekeeping

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """As peft's, which warns of a layer that it does not know."""
        return self.in_features, self.out_features

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Like peft's, but without its cast to the base's dtype: on a bfloat16 base that would round float32 values on reload."""
        if self._a(adapter_name).device.type == "meta":
            return
        for factors in (self.lora_A, self.lora_B):
            factors[adapter_name].to(device or device_of(self.base_layer))
