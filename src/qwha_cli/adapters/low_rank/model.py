"""peft's LoRA tuner with our layers in it, wherever a model has quantized layers.

Once it is registered (peft_bridge.py) it stands in the place of peft's own tuner for the method LORA. On a model without any
QuantizedLinear it does what peft's does; on one with, plain `PeftModel.from_pretrained` works where peft alone refuses the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraModel
from torch import nn

from qwha_cli.adapters.adapted_linear import adapted_layers
from qwha_cli.adapters.low_rank.layer import LowRankLinear
from qwha_cli.adapters.tuning import MergingTuner, check_names
from qwha_cli.kernels.low_rank import LowRank
from qwha_cli.quant.linear import QuantizedLinear


class LowRankModel(MergingTuner, LoraModel):
    """peft's tuner for the method "lora"; made by `get_peft_model`, not by hand."""

    # ---- adding

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            use_our_layers(peft_config)
        super()._prepare_model(cast(LoraConfig, peft_config), model)

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


def use_our_layers(config: PeftConfig) -> None:
    """Have peft put LowRankLinear on linear layers, quantized or not."""
    ours = {QuantizedLinear: LowRankLinear, nn.Linear: LowRankLinear}
    # peft's documented way to bring layers of one's own, whatever its name says
    cast(LoraConfig, config)._register_custom_module(ours)  # pyright: ignore[reportPrivateUsage, reportArgumentType]
