"""The calls that the stages make: put an adapter on a model, load one, save one, look at its layers.

They are the same for both kinds of adapter; which kind is added follows from the start values, which kind is loaded from the
folder. They hide peft's habits: a path that asks the network, warnings where an error is meant, module names with a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwha_cli.adapters.adapted_linear import AdaptedLinear
from qwha_cli.adapters.adapted_linear import adapted_layers as _adapted_layers
from qwha_cli.adapters.folder import BASE_FILE, check_places, check_tensors, complete, read_base, read_config
from qwha_cli.adapters.low_rank.model import LowRankModel, use_our_layers
from qwha_cli.adapters.peft_bridge import register
from qwha_cli.adapters.provenance import base_fingerprint, check_base
from qwha_cli.adapters.spectral.config import SpectralConfig, Store, store_dtype
from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.adapters.spectral.model import SpectralModel
from qwha_cli.errors import ArtifactError, ModelError
from qwha_cli.kernels.backend import Requested, choose
from qwha_cli.kernels.effective_weight import OP
from qwha_cli.kernels.low_rank import LowRank
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.wht import choose_transform
from qwha_cli.quant.linear import QuantizedLinear

ADAPTER = "default"
Start = SparseRows | LowRank
"""What an initializer computes for a layer (out, in): F of a sparse adapter, or the factors of a LoRA."""


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    scale: float,
    targets: list[str],
    start: Mapping[str, Start],
    fingerprint: str | None = None,
    store: Store = "bfloat16",
) -> PeftModel:
    """Put a trainable adapter on a base, with the start that an initializer computed.

    Args:
        model: The base; changed in place.
        rank: Of a LoRA's factors; of a sparse adapter it is noted in the config, the entries are those of `start`.
        scale: Factor α on the adapter's contribution.
        targets: Full module names.
        start: For each of them; all of one kind, which decides what the adapter is.
        fingerprint: The base's, where it is known and the base is a skeleton; None to compute it.
        store: Number format of a sparse adapter's values in files; the values on the model are those of `start`, see `as_stored`.

    Returns:
        The PeftModel around the base; only the adapter's values require gradients.

    Raises:
        ModelError: A target has no start or cannot be adapted, or a name is not in the model.
        ArtifactError: The start of a layer has another shape than the layer.
    """
    register()
    _check_targets(model, targets, start)
    chosen = {name: start[name] for name in targets}
    sparse = {name: value for name, value in chosen.items() if isinstance(value, SparseRows)}
    factors = {name: value for name, value in chosen.items() if isinstance(value, LowRank)}
    assert not (sparse and factors), "an adapter is of one kind"
    if factors:
        config = _low_rank_config(rank, scale, targets)
    else:
        config = _spectral_config(rank, scale, targets, store=store, fingerprint=fingerprint or base_fingerprint(model))
    peft_model = cast(PeftModel, get_peft_model(model, config, adapter_name=ADAPTER))
    if factors:
        cast(LowRankModel, peft_model.base_model).assign(ADAPTER, factors)
    else:
        cast(SpectralModel, peft_model.base_model).assign(ADAPTER, sparse)
    return peft_model


def _check_targets(model: nn.Module, targets: list[str], start: Mapping[str, Start]) -> None:
    modules = dict(model.named_modules())
    for name in targets:
        if name not in modules:
            raise ModelError("the model has no such module", where=f"layer {name}", remedy="use full module names of this model")
        if name not in start:
            raise ModelError("no start was computed for this layer", where=f"layer {name}", remedy="run qwha init again")


def _spectral_config(rank: int, scale: float, targets: list[str], *, store: Store, fingerprint: str | None) -> SpectralConfig:
    return SpectralConfig(
        task_type="CAUSAL_LM",
        rank=rank,
        scale=scale,
        target_modules=set(targets),
        # nothing to draw or to reserve: `assign` brings places and values
        entries=dict.fromkeys(targets, 0),
        gap_bytes=dict.fromkeys(targets, 0),
        store=store,
        base_fingerprint=fingerprint,
    )


def _low_rank_config(rank: int, scale: float, targets: list[str]) -> LoraConfig:
    alpha = scale * rank
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        # peft declares an integer, and takes any number
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
        target_modules=sorted(targets),
    )
    use_our_layers(config)
    return config


def as_stored(rows: SparseRows, store: Store) -> SparseRows:
    """F as it comes back from a file: what is measured on this is true of the adapter that is read."""
    return rows.rounded(store_dtype(store))


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
    """Put a saved adapter on its base, after checking that this is its base and that the file is sound.

    Args:
        model: The base; changed in place.
        folder: Holds adapter_config.json and adapter_model.safetensors, and for a LoRA qwha_base.json.
        trainable: Whether its values require gradients; otherwise the model is put in eval mode, and a sparse adapter's values
            keep the file's number format.

    Returns:
        The PeftModel around the base.

    Raises:
        ArtifactError: A file is missing or damaged, is not an adapter of ours, or belongs to another base.
    """
    register()
    try:
        config = read_config(folder)
        if isinstance(config, LoraConfig):
            # the sparse adapter's tuner does this itself, for everyone who loads one
            check_base(read_base(folder).base_fingerprint, model, where=BASE_FILE)
            use_our_layers(config)
        check_tensors(folder, config, model)
        peft_model = PeftModel.from_pretrained(
            model,
            str(folder),
            adapter_name=ADAPTER,
            is_trainable=trainable,
            config=config,
            torch_device=str(model.device),
        )
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"the adapter cannot be read: {error}", where=str(folder), remedy="run the stage that writes it again"
        ) from error
    check_places(peft_model, folder, adapter=ADAPTER)
    return peft_model


def save_adapter(peft_model: PeftModel, folder: Path, *, base: str | None = None, fingerprint: str | None = None) -> None:
    """Write adapter_config.json, adapter_model.safetensors and a model card that says how to load them. Asks no network.

    A LoRA's base is written beside them, into qwha_base.json.

    Args:
        peft_model: The model whose adapter is written.
        folder: Made if it is missing.
        base: What to write as base_model_name_or_path, from which AutoPeftModel loads the base; by default what the model knows.
        fingerprint: The base's, where it is known and the base is a skeleton; None to compute it.
    """
    config = peft_model.peft_config[ADAPTER]
    if base is not None:
        config.base_model_name_or_path = base
    _sort_targets(config)
    # otherwise peft looks the base's vocabulary up on the hub (peft#1452)
    peft_model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)
    complete(folder, config, peft_model, fingerprint=fingerprint)


def _sort_targets(config: PeftConfig) -> None:
    """Have the same adapter always write the same file: peft writes a set in whatever order it has."""
    targets = getattr(config, "target_modules", None)
    if isinstance(config, LoraConfig) and isinstance(targets, set):
        config.target_modules = sorted(cast(set[str], targets))


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """All adapted layers, of either kind, by the full module name that they have in the base model."""
    return _adapted_layers(model)


def merged_weight(layer: AdaptedLinear, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of base plus active adapters in the weight basis, computed in float32."""
    return layer.merged_weight(dtype)


def cache_weights(model: nn.Module, on: bool) -> None:
    """Keep (or drop) every layer's dense effective weight between forward passes in eval mode, see AdaptedLinear."""
    for layer in _adapted_layers(model).values():
        layer.cache_weights(on)


def freeze_adapter(model: nn.Module) -> None:
    """Leave an adapter as `load_adapter` leaves one that is not trained: frozen, in bfloat16 where that loses nothing."""
    for layer in _adapted_layers(model).values():
        if isinstance(layer, SpectralLinear):
            layer.freeze(ADAPTER)
        layer.requires_grad_(False)


def set_backend(
    model: PreTrainedModel | PeftModel, backend: Requested, *, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[str, ...]:
    """Choose for all layers, adapted or only quantized, which implementation of the kernels they ask for.

    Args:
        model: The model.
        backend: What is asked for.
        dtype: In which the layers will compute.
        device: Where; None for where the model is.

    Returns:
        A sentence on what builds the layers' weights and why, and one for each size whose transform is left to torch beside it.

    Raises:
        KernelError: `triton` was asked for, and cannot run there.
    """
    where = device if device is not None else next(model.parameters()).device
    choice = choose(backend, op=OP, device=where)
    sizes: set[int] = set()
    for module in model.modules():
        if isinstance(module, AdaptedLinear | QuantizedLinear):
            module.backend = backend
            sizes.add(module.in_features)
    found = [f"layers' weights by {choice.name}: {choice.reason}"]
    if choice.name == "triton":
        transforms = {size: choose_transform("auto", size=size, dtype=dtype, device=where) for size in sorted(sizes)}
        found += [f"transform of {n} numbers by torch: {t.reason}" for n, t in transforms.items() if t.name == "torch"]
    return tuple(found)
