"""The tuner that puts SpectralLinear layers into a model: what peft calls when an adapter is added, saved, loaded or merged.

Beside peft's own work it (1) resolves "all-linear" so that quantized layers count, (2) builds every layer's tensors in the size
that the file will have, (3) refuses a foreign base, foreign Hadamard matrices or an older format before anything is changed,
(4) writes their identity into the config and the values in the file's number format when an adapter is saved, and (5) turns a
quantized model into an ordinary one on merge_and_unload.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from peft import PeftConfig
from torch import Tensor, nn

from qwha_cli.adapters.adapted_linear import adapted_layers
from qwha_cli.adapters.provenance import base_fingerprint, check_base, check_transform, hadamard_digests
from qwha_cli.adapters.spectral.config import Sizes, SpectralConfig, store_dtype
from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.adapters.spectral.places import budget, random_rows
from qwha_cli.adapters.tuning import MergingTuner, check_names
from qwha_cli.errors import ModelError
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.quant.linear import QuantizedLinear

ALL_LINEAR = "all-linear"
_VALUES = ".qwha_values."


class SpectralModel(MergingTuner):
    """peft's tuner for the method "qwha"; made by `get_peft_model`, not by hand."""

    prefix = "qwha_"
    tuner_layer_cls = SpectralLinear
    # no per-architecture table: without target_modules every linear layer but the head is meant
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's own annotation

    # ---- adding

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast(SpectralConfig, peft_config)
        if config.target_modules is None:
            config.target_modules = ALL_LINEAR
        return config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check that the adapter fits, while the model is still untouched; peft calls this for every adapter that is added."""
        config = cast(SpectralConfig, peft_config)
        config.check_format()
        check_transform(config.hadamard_digest)
        check_base(config.base_fingerprint, model)
        if config.target_modules == ALL_LINEAR:
            config.target_modules = all_linear(model)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(SpectralConfig, peft_config)
        try:
            layer = target if isinstance(target, SpectralLinear) else SpectralLinear(target)
        except ModelError as error:
            raise ModelError(error.message, where=f"layer {current_key}", remedy=error.remedy) from error
        layer.update_layer(
            adapter_name,
            start=_start(layer, config, current_key),
            scale=config.scale,
            transform=config.transform,
            inference_mode=config.inference_mode,
            stored=store_dtype(config.store),
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                # an additional adapter is not trainable until it is made active
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Peft's version copies `weight` between the two, which packed codes do not have; ours are built on the right device."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: what is trained is float32 already, and what is not would only take more memory as such."""

    def assign(self, adapter_name: str, rows: Mapping[str, SparseRows]) -> None:
        """Give layers of an adapter their computed start: places and values.

        Args:
            adapter_name: An adapter that exists.
            rows: F (out, in) by full module name of the base model; layers not named keep what they have.

        Raises:
            ModelError: A name is no layer of this adapter.
            ArtifactError: A shape is not the layer's.
        """
        check_names(self.model, adapter_name, rows)
        layers = spectral_layers(self.model)
        for name, layer_rows in rows.items():
            layers[name].set_rows(adapter_name, layer_rows)
        _note_sizes(cast(SpectralConfig, self.peft_config[adapter_name]), layers, adapter_name)

    # ---- saving

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # peft and transformers write the config after this, so here is the place to complete it
        ours = cast(SpectralConfig, config)
        _note_sizes(ours, spectral_layers(model), adapter_name)
        if ours.base_fingerprint is None:
            ours.base_fingerprint = base_fingerprint(model)
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        dtype = store_dtype(ours.store)
        return {name: tensor.to(dtype) if _VALUES in name else tensor for name, tensor in tensors.items()}


def spectral_layers(model: nn.Module) -> dict[str, SpectralLinear]:
    """All layers with a spectral adapter by the full module name that they have in the base model.

    Args:
        model: A PeftModel, the tuner in it, or a transformers model with injected adapters.
    """
    return {name: layer for name, layer in adapted_layers(model).items() if isinstance(layer, SpectralLinear)}


def all_linear(model: nn.Module) -> set[str]:
    """Names of all layers that "all-linear" means: nn.Linear, QuantizedLinear, adapted ones; not the output head."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    names: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) if inside else False:
            continue
        if isinstance(module, SpectralLinear):
            # what lies in an adapted layer is no target of its own
            inside = (*inside, f"{name}.")
        if isinstance(module, nn.Linear | QuantizedLinear | SpectralLinear) and module is not head:
            names.add(name)
    return names


def _start(layer: SpectralLinear, config: SpectralConfig, name: str) -> SparseRows | Sizes:
    shape = (layer.out_features, layer.in_features)
    return config.sizes_of(name) or random_rows(shape, entries=budget(shape, config.rank), seed=config.seed, name=name)


def _note_sizes(config: SpectralConfig, layers: Mapping[str, SpectralLinear], adapter_name: str) -> None:
    own = {name: layer for name, layer in layers.items() if adapter_name in layer.qwha_values}
    config.entries = {name: layer.qwha_values[adapter_name].numel() for name, layer in own.items()}
    config.gap_bytes = {name: cast(Tensor, layer.qwha_gaps[adapter_name]).numel() for name, layer in own.items()}
    if config.transform == "wht":
        config.hadamard_digest = hadamard_digests(layer.in_features for layer in own.values())
