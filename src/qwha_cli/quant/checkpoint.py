"""Quantized models on disk: an ordinary Hugging Face folder whose config says which linears are packed, and how.

    config.json             with quantization_config: quant_method "qwha", format, module names, fingerprint, Hadamard digests
    model*.safetensors      packed tensors under the modules' names, everything else in the model's dtype; tied weights once
    generation_config.json, tokenizer files

The integer codes lie there as GPTQ's format v2 has them, without g_idx (groups are consecutive). A model larger than the memory
is written block by block and assembled at the end. Writing is not atomic: the caller writes into a draft folder
(artifacts/store.py). How transformers reads it back is in transformers_plugin.py.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from qwha_cli.artifacts.tensors import join, write_tensors
from qwha_cli.errors import ArtifactError, ModelError
from qwha_cli.quant.embedding import TiedHead, Vocabulary, vocabulary_in
from qwha_cli.quant.fingerprint import PackedLayer, fingerprint, packed_modules, quantized_layers
from qwha_cli.quant.packed import QuantFormat
from qwha_cli.quant.transformers_plugin import METHOD, QwhaQuantizationConfig, register

__all__ = ["assemble", "check_config", "fingerprint", "load_base", "save_base", "tied_names"]

SHARD_BYTES = 4 * 10**9

_REMEDY = "remove the folder and quantize the model again"


def save_base(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    format: QuantFormat,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a live model whose target linears are QuantizedLinear.

    Args:
        model: Left as it is; what is not quantized is written in its dtype.
        folder: Made if missing; files of ours in it are replaced, others stay.
        tokenizer: Written beside the model; None writes none.
        format: The one format of all quantized layers.
        shard_bytes: Most bytes of a weight file.

    Raises:
        ModelError: No layer is quantized, or one has another format.
    """
    vocabulary = vocabulary_in(model)
    apart = () if vocabulary is None else (vocabulary.embedding, vocabulary.head)
    layers = {name: layer for name, layer in quantized_layers(model).items() if name not in apart}
    words = {name: module.packed().digest() for name, module in packed_modules(model).items() if name in apart}
    for name, layer in layers.items():
        if layer.format != format:
            raise ModelError(
                f"the layer is stored as {layer.format}, the model as {format}",
                where=f"layer {name}",
                remedy="quantize all layers with the same settings",
            )
    packed = {name: PackedLayer(layer.in_features, layer.packed().digest()) for name, layer in layers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as parts:
        part = Path(parts) / "model.safetensors"
        tied = tied_names(model)
        write_tensors(part, {name: tensor for name, tensor in model.state_dict().items() if name not in tied})
        assemble(
            folder,
            [part],
            model=model,
            dtype=model.dtype,
            layers=packed,
            format=format,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            words=words,
            shard_bytes=shard_bytes,
        )


def assemble(
    folder: Path,
    parts: Sequence[Path],
    *,
    model: PreTrainedModel,
    dtype: torch.dtype,
    layers: Mapping[str, PackedLayer],
    format: QuantFormat,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: Vocabulary | None = None,
    words: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Make a folder of tensors that were written before.

    Args:
        folder: An existing folder.
        parts: safetensors files that together hold every tensor of the model once.
        model: Its configuration is written; its tensors are not read.
        dtype: Number format of what is not quantized, for the configuration.
        layers: What is quantized in the blocks, by full name.
        format: Of all these layers.
        tokenizer: Written beside the model; None writes none.
        vocabulary: Embedding and head, where they are in codes.
        words: Digests of the modules that are `vocabulary.owners`.
        shard_bytes: Most bytes of a weight file.

    Raises:
        ModelError: No layer is quantized.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.quantization_config = QwhaQuantizationConfig.describing(layers, format, vocabulary=vocabulary, words=words)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    join(parts, folder, shard_bytes=shard_bytes)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Names of weights that a file does not hold because they are others' too: the head's to the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # a head that reads the embedding's codes has no tensor of its own
    if head is None or isinstance(head, TiedHead) or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


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
    check_config(path)
    register()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"the quantized model cannot be read: {error}", where=str(path), remedy=_REMEDY) from error
    model, info = cast("tuple[PreTrainedModel, dict[str, object]]", loaded)
    _check_loaded(path, info)
    cast(nn.Module, model).to(device)
    return model.eval()


def check_config(folder: Path) -> None:
    """Refuse a folder whose config.json is not one of ours, before anything heavy is loaded.

    Raises:
        ArtifactError: It is not.
    """
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
