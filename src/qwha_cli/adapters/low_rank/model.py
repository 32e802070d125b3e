"""peft's LoRA tuner with our layers in it, wherever a model has quantized layers.

Once it is registered (peft_bridge.py) it stands in the place of peft's own tuner for the method LORA. On a model without any
QuantizedLinear it does what peft's does; on one with, plain `PeftModel.from_pretrained` works where peft alone refuses the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraModel
from torch import nn

from qwha_cli.adapters.adapted_linear import adapted_layers
from qwha_cli.adapters.low_rank.layer import LowRankLinear
from qwha_cli.adapters.tuning import check_names, dequantize, frozen_buffers, hand_on_dtype
from qwha_cli.kernels.low_rank import LowRank
from qwha_cli.quant.linear import QuantizedLinear


class LowRankModel(LoraModel):
    """peft's tuner for the method "lora"; made by `get_peft_model`, not by hand."""

    # ---- adding

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            use_our_layers(peft_config)
        super()._prepare_model(peft_config, model)

    def assign(self, adapter_name: str, factors: Mapping[str, LowRank]) -> None:
        """Give layers of an adapter their computed start.

        Args:
            adapter_name: An adapter that exists.
            factors: A and B by full module name of the base model; layers not named keep what they have.

        Raises:
            ModelError: A name is no layer of this adapter.
            ArtifactError: A shape or rank is not the layer's.
        """
        check_names(self.model, adapter_name, factors)
        layers = adapted_layers(self.model)
        for name, layer_factors in factors.items():
            cast(LowRankLinear, layers[name]).set_factors(adapter_name, layer_factors)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Tensors that DistributedDataParallel must leave alone."""
        return frozen_buffers(self)

    # ---- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft. A quantized layer makes way for a dense one in the model's dtype until `unmerge_adapter`."""
        hand_on_dtype(self.model)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # noqa: ANN401 - peft declares None but returns the model
        ours = bool(adapted_layers(self.model))
        hand_on_dtype(self.model)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge and ours:
            dequantize(self.model)
        return self.model


def use_our_layers(config: PeftConfig) -> None:
    """Have peft put LowRankLinear on linear layers, quantized or not."""
    ours = {QuantizedLinear: LowRankLinear, nn.Linear: LowRankLinear}
    # peft's documented way to bring layers of one's own, whatever its name says
    cast(LoraConfig, config)._register_custom_module(ours)  # pyright: ignore[reportPrivateUsage, reportArgumentType]
