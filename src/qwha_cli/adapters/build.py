"""The calls that the stages make: put an adapter on a model, load one, save one, look at its layers.

They hide peft's habits: a path that asks the network, warnings where an error is meant, module names with a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwha_cli.adapters.peft_bridge import METHOD, register
from qwha_cli.adapters.provenance import base_fingerprint
from qwha_cli.adapters.spectral.config import Sizes, SpectralConfig, Store, store_dtype
from qwha_cli.adapters.spectral.layer import Keep, SpectralLinear
from qwha_cli.adapters.spectral.model import SpectralModel
from qwha_cli.adapters.spectral.model import spectral_layers as _spectral_layers
from qwha_cli.errors import ArtifactError, ModelError
from qwha_cli.kernels.sparse_matmul import SparseRows

ADAPTER = "default"
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_AGAIN = "run the stage that writes it again"
_LOADING = """
## Loading

peft and transformers know this adapter's method after one import; without it they stop at `KeyError: 'QWHA'`.

    import qwha_cli.integrations
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained("this folder")
"""


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    scale: float,
    targets: list[str],
    rows: Mapping[str, SparseRows],
    fingerprint: str | None = None,
    store: Store = "bfloat16",
) -> PeftModel:
    """Put a trainable adapter on a base, with the places and values that an initializer computed.

    Args:
        model: The base; changed in place.
        rank: Noted in the config; the entries are those of `rows`.
        scale: Factor α on F.
        targets: Full module names.
        rows: F (out, in) for each of them.
        fingerprint: The base's, where it is known and the base is a skeleton; None to compute it.
        store: Number format of the values in files; the values on the model are those of `rows`, see `as_stored`.

    Returns:
        The PeftModel around the base; only the adapter's values require gradients.

    Raises:
        ModelError: A target has no rows or cannot be adapted, or a name is not in the model.
        ArtifactError: The rows of a layer have another shape than the layer.
    """
    register()
    _check_targets(model, targets, rows)
    config = SpectralConfig(
        task_type="CAUSAL_LM",
        rank=rank,
        scale=scale,
        target_modules=set(targets),
        # nothing to draw or to reserve: `assign` brings places and values
        entries=dict.fromkeys(targets, 0),
        gap_bytes=dict.fromkeys(targets, 0),
        store=store,
        base_fingerprint=fingerprint or base_fingerprint(model),
    )
    peft_model = cast(PeftModel, get_peft_model(model, config, adapter_name=ADAPTER))
    cast(SpectralModel, peft_model.base_model).assign(ADAPTER, {name: rows[name] for name in targets})
    return peft_model


def _check_targets(model: nn.Module, targets: list[str], rows: Mapping[str, SparseRows]) -> None:
    modules = dict(model.named_modules())
    for name in targets:
        if name not in modules:
            raise ModelError("the model has no such module", where=f"layer {name}", remedy="use full module names of this model")
        if name not in rows:
            raise ModelError("no entries were computed for this layer", where=f"layer {name}", remedy="run qwha init again")


def as_stored(rows: SparseRows, store: Store) -> SparseRows:
    """F as it comes back from a file: what is measured on this is true of the adapter that is read."""
    return rows.rounded(store_dtype(store))


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
    """Put a saved adapter on its base, after checking that this is its base and that the file is sound.

    Args:
        model: The base; changed in place.
        folder: Holds adapter_config.json and adapter_model.safetensors.
        trainable: Whether its values require gradients; otherwise the model is put in eval mode.

    Returns:
        The PeftModel around the base.

    Raises:
        ArtifactError: A file is missing or damaged, is not an adapter of ours, or belongs to another base.
    """
    register()
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ArtifactError(f"no {' and no '.join(missing)}", where=str(folder), remedy=_AGAIN)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, SpectralConfig):
            method = f"{config.peft_type}".removeprefix("PeftType.")
            message = f"the adapter's method is {method}, not {METHOD.upper()}"
            raise ArtifactError(message, where=str(folder), remedy="load it with peft alone")
        config.check_format()
        _check_tensors(folder, config)
        peft_model = PeftModel.from_pretrained(
            model, str(folder), adapter_name=ADAPTER, is_trainable=trainable, torch_device=str(model.device)
        )
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"the adapter cannot be read: {error}", where=str(folder), remedy=_AGAIN) from error
    _check_places(peft_model, folder)
    return peft_model


def _check_tensors(folder: Path, config: SpectralConfig) -> None:
    """Peft only warns of a missing tensor and goes on with zeros."""
    with safe_open(folder / _FILES[1], framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        found = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    values = {"bfloat16": "BF16", "float32": "F32"}[config.store]
    for name in config.entries or {}:
        sizes = cast(Sizes, config.sizes_of(name))
        for part, expected in {"qwha_values": (values, (sizes.entries,)), "qwha_gaps": ("U8", (sizes.gap_bytes,))}.items():
            tensor = found.get(f"base_model.model.{name}.{part}")
            if tensor != expected:
                shown = "none" if tensor is None else f"{tensor[1]} of {tensor[0]}"
                raise ArtifactError(
                    f"layer {name} should have {expected[1]} of {expected[0]} as {part}, the file has {shown}",
                    where=str(folder),
                    remedy=_AGAIN,
                )


def _check_places(model: nn.Module, folder: Path) -> None:
    """A place outside of its matrix would be a wrong weight on a CPU and end the process on a GPU."""
    for name, layer in _spectral_layers(model).items():
        try:
            layer.rows(ADAPTER)
        except ArtifactError as error:
            raise ArtifactError(f"layer {name}: {error.message}", where=str(folder), remedy=_AGAIN) from error


def save_adapter(peft_model: PeftModel, folder: Path, *, base: str | None = None) -> None:
    """Write adapter_config.json, adapter_model.safetensors and a model card that says how to load them. Asks no network.

    Args:
        peft_model: The model whose adapter is written.
        folder: Made if it is missing.
        base: What to write as base_model_name_or_path, from which AutoPeftModel loads the base; by default what the model knows.
    """
    config = peft_model.peft_config[ADAPTER]
    if base is not None:
        config.base_model_name_or_path = base
    # otherwise peft looks the base's vocabulary up on the hub (peft#1452)
    peft_model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    if _LOADING.strip() not in text:
        card.write_text(text + _LOADING, encoding="utf-8")


def spectral_layers(model: nn.Module) -> dict[str, SpectralLinear]:
    """All adapted layers by the full module name that they have in the base model."""
    return _spectral_layers(model)


def merged_weight(layer: SpectralLinear, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of base plus active adapters in the weight basis: Q̂ + α F Hᵀ, or (Q̂ + α F) Hᵀ; computed in float32."""
    return layer.merged_weight(dtype)


def cache_weights(model: nn.Module, on: bool) -> None:
    """Keep (or drop) every layer's dense effective weight between forward passes in eval mode, see SpectralLinear."""
    for layer in _spectral_layers(model).values():
        layer.cache_weights(on)


def set_keep(model: nn.Module, keep: Keep) -> None:
    """Choose for all layers whether backward computes the effective weight again ("memory") or keeps it ("speed")."""
    for layer in _spectral_layers(model).values():
        layer.keep = keep
