"""Quantized models on disk: an ordinary Hugging Face folder whose config says which linears are packed, and how.

    config.json             with quantization_config: quant_method "qwha", format, module names, fingerprint, Hadamard digests
    model*.safetensors      packed tensors under the layers' names, everything else in the model's dtype; tied weights once
    generation_config.json, tokenizer files

The integer codes lie there as GPTQ's format v2 has them, without g_idx (groups are consecutive). Writing is not atomic: the
caller writes into a draft folder (artifacts/store.py). How transformers reads it back is in transformers_plugin.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from qwha_cli.errors import ArtifactError, ModelError
from qwha_cli.quant.fingerprint import fingerprint, quantized_layers
from qwha_cli.quant.packed import QuantFormat
from qwha_cli.quant.transformers_plugin import METHOD, QwhaQuantizationConfig, register

__all__ = ["fingerprint", "load_base", "save_base"]

_REMEDY = "remove the folder and quantize the model again"


def save_base(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    format: QuantFormat,
    shard_size: str = "4GB",
) -> None:
    """Write a live model whose target linears are QuantizedLinear.

    Args:
        model: Left as it is; what is not quantized is written in its dtype.
        folder: Made if missing; files of ours in it are replaced, others stay.
        tokenizer: Written beside the model; None writes none.
        format: The one format of all quantized layers.
        shard_size: Largest size of a weight file, as transformers reads it.

    Raises:
        ModelError: No layer is quantized, or one has another format.
    """
    for name, layer in quantized_layers(model).items():
        if layer.format != format:
            raise ModelError(
                f"the layer is stored as {layer.format}, the model as {format}",
                where=f"layer {name}",
                remedy="quantize all layers with the same settings",
            )
    described = QwhaQuantizationConfig.describing(model, format)
    before = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = described
    try:
        model.save_pretrained(folder, max_shard_size=shard_size)
    finally:
        if before is None:
            delattr(model.config, "quantization_config")
        else:
            model.config.quantization_config = before
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_base(folder: Path | str, *, dtype: torch.dtype | str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a folder written by `save_base`, in eval mode, and check that it is whole.

    Args:
        folder: The folder.
        dtype: Number format of what is not quantized; "auto" for the one that it was saved in.
        device: Where to put the model.

    Returns:
        The model, bit by bit the one that was saved if the dtype is.

    Raises:
        ArtifactError: The folder is missing, not ours, incomplete, damaged, or made with other Hadamard matrices.
    """
    path = Path(folder)
    _check_config(path)
    register()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"the quantized model cannot be read: {error}", where=str(path), remedy=_REMEDY) from error
    model, info = cast("tuple[PreTrainedModel, dict[str, object]]", loaded)
    _check_loaded(path, info)
    cast(nn.Module, model).to(device)
    return model.eval()


def _check_config(folder: Path) -> None:
    """Refuse a folder whose config.json is not one of ours, before anything heavy is loaded."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"no readable config.json: {error}", where=str(folder), remedy="make it with `qwha quantize RECIPE`"
        ) from error
    found = config.get("quantization_config") if isinstance(config, dict) else None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method != METHOD:
        raise ArtifactError(
            f"this is no model quantized by qwha: quant_method is {method!r}, expected {METHOD!r}",
            where=str(path),
            remedy="give the 1-quantize folder of a run",
        )


def _check_loaded(folder: Path, info: dict[str, object]) -> None:
    """Refuse a model of which transformers says that something did not fit; by itself it fills the gaps with noise."""
    faults = {"missing": info.get("missing_keys"), "of another shape": info.get("mismatched_keys")}
    for what, keys in faults.items():
        names = sorted(str(key) for key in cast("set[object]", keys or ()))
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ArtifactError(f"{len(names)} tensors are {what}: {shown}", where=str(folder), remedy=_REMEDY)
