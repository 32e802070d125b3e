"""The quantize stage: a 16-bit model in, packed 2-, 3- or 4-bit codes out, block by block.

Calibration text runs through the already quantized blocks, so each layer is fitted to the inputs it will really see. One block's
full-precision weights and Gram matrices are in memory at a time: weights come from memory-mapped files, and a finished block goes
to the work folder at once, where a killed run finds it again. Embedding and head go first, if they are quantized at all
(vocabulary.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from qwha_cli import catalog
from qwha_cli.artifacts.blocks import FinishedBlocks, Record
from qwha_cli.artifacts.tensors import write_tensors
from qwha_cli.initializers.global_budget import GAIN_DAMPING, measure_gains
from qwha_cli.kernels.wht import wht
from qwha_cli.models.sensitivity import Sensitivity
from qwha_cli.models.stream import OpenModel
from qwha_cli.models.targets import Target, decoder_blocks, find_targets
from qwha_cli.models.walk import Block
from qwha_cli.quant.checkpoint import assemble, tied_names
from qwha_cli.quant.error import layer_error, sqnr_db
from qwha_cli.quant.fingerprint import PackedLayer
from qwha_cli.quant.gram import Gram
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import PackedWeight, QuantFormat, QuantizerOptions, check_group
from qwha_cli.quant.swap import get_linear, replace
from qwha_cli.recipe.schema import Recipe
from qwha_cli.stages.calibrated import (
    by_block,
    calibration,
    finished_blocks,
    measured_sensitivity,
    note_blocks,
    note_devices,
    open_original,
    walk_through,
)
from qwha_cli.stages.context import StageContext, write_lines
from qwha_cli.stages.reconstruct import reconstruct_base
from qwha_cli.stages.spread import spread
from qwha_cli.stages.vocabulary import Words, quantize_vocabulary

Quantize = Callable[..., PackedWeight]


def run(context: StageContext) -> dict[str, object]:
    """Quantize the recipe's model and write it as a Hugging Face folder with layers.jsonl; return the summary."""
    recipe = context.recipe
    opened = open_original(context)
    # asked before the walk, which leaves blocks in the format that it computed in
    dtype = _stored_dtype(context, opened)
    targets = by_block(opened.model, quantized_targets(opened.model, recipe))
    context.progress(0, 1, "reading calibration text")
    tokens = calibration(context, opened.tokenizer)
    # of the 16-bit model, so before anything of it is exchanged
    sensitivity = measured_sensitivity(context, opened, tokens)
    words = quantize_vocabulary(context, opened)
    finished = finished_blocks(context)
    records: list[Record] = []
    beside = opened if recipe.quantize.reconstruct != "none" else None
    for block in walk_through(context, opened, tokens, original=beside):
        kept = finished.records(block.index)
        if kept is None:
            kept = _quantize_block(context, opened, block, targets[block.index], finished, sensitivity)
        else:
            _restore_block(opened, block, finished.tensors(block.index), kept, format=_options(recipe).format)
        records += kept
        context.progress(block.index + 1, len(targets), block.name)
    write_lines(context.draft / "layers.jsonl", records)
    context.progress(len(targets), len(targets), "writing the model")
    layers = {cast(str, r["name"]): PackedLayer(cast("list[int]", r["shape"])[1], cast(str, r["digest"])) for r in records}
    parts = [*_outside_blocks(context, opened, words), *(finished.tensor_file(index) for index in range(len(targets)))]
    assemble(
        context.draft,
        parts,
        model=opened.model,
        dtype=dtype,
        layers=layers,
        format=_options(recipe).format,
        tokenizer=opened.tokenizer,
        vocabulary=None if words is None else words.vocabulary,
        words=None if words is None else words.digests(),
    )
    context.events.layers("quantize", records)
    return _summary(records, opened, words) | ({} if words is None else words.results())


def quantized_targets(model: nn.Module, recipe: Recipe) -> list[Target]:
    """Return the linears to quantize: all inside the blocks, but for those the recipe excludes.

    Raises:
        ModelError: A layer's input size is no multiple of the group size.
    """
    targets = find_targets(model, targets="all-linear", exclude=list(recipe.quantize.exclude))
    for target in targets:  # all of them first: a run must not fail in its last block for something known before
        check_group(target.name, get_linear(model, target.name).in_features, recipe.quantize.group_size)
    return targets


def _options(recipe: Recipe) -> QuantizerOptions:
    q = recipe.quantize
    return QuantizerOptions(
        method=q.method,
        bits=q.bits,
        group_size=q.group_size,
        symmetric=q.symmetric,
        basis=q.basis,
        grid=q.grid,
        damping=q.damping,
        magr=q.magr,
        sweeps=q.sweeps,
        zeros=q.zeros,
    )


def _quantize_block(
    context: StageContext,
    opened: OpenModel,
    block: Block,
    targets: list[Target],
    finished: FinishedBlocks,
    sensitivity: Sensitivity | None,
) -> list[Record]:
    """Quantize the layers of a block, keep the block, and return its records."""
    weights = sensitivity.tokens if sensitivity else None
    seen = block.grams([target.name for target in targets], token_weights=weights)
    grams = {name: _in_basis(context, gram) for name, gram in seen.items()}
    shapes = {target.name: opened.shape(target.name) for target in targets}
    for _, size in shapes.values() if context.recipe.quantize.basis == "hadamard" else ():
        note_blocks(context, size)
    note_devices(context)
    packed = spread(
        shapes, lambda name, gram: _quantize_layer(context.recipe, opened, name, gram), grams=grams, devices=context.devices
    )
    seconds: dict[str, float] = {}
    for name, (layer, spent) in packed.items():
        there = {key: tensor.to(block.device) for key, tensor in layer.tensors.items()}
        _put(opened, name, PackedWeight(there, layer.format, layer.shape))
        seconds[name] = spent
    started = time.monotonic()
    errors: Record = {}
    if context.recipe.quantize.reconstruct != "none":
        errors |= reconstruct_base(context, opened, block, targets, sensitivity)
    share = (time.monotonic() - started) / max(1, len(targets))
    records = [
        _record(opened, target, seen[target.name], seconds=seconds[target.name] + share, with_gains=sensitivity is not None)
        | errors
        for target in targets
    ]
    finished.save(block.index, _block_tensors(context, opened, block), records)
    return records


def _in_basis(context: StageContext, gram: Gram) -> Gram:
    """The Gram matrix in the basis that the codes will be in."""
    return gram.in_hadamard_basis() if context.recipe.quantize.basis == "hadamard" else gram


def _quantize_layer(recipe: Recipe, opened: OpenModel, name: str, gram: Gram) -> tuple[PackedWeight, float]:
    """The quantized form of one linear, made where its Gram matrix is, and the seconds it took."""
    started = time.monotonic()
    gram.check_finite(name)
    quantize = cast(Quantize, catalog.load(catalog.QUANTIZERS[recipe.quantize.method]))
    weight = opened.weight_in(recipe.quantize.basis, name, device=gram.device)
    packed = quantize(weight, gram, options=_options(recipe), name=name)
    return packed, time.monotonic() - started


def _record(opened: OpenModel, target: Target, gram: Gram, *, seconds: float, with_gains: bool) -> Record:
    """The line of a quantized layer in layers.jsonl.

    Args:
        opened: The 16-bit model with the quantized layer in its place.
        target: The layer.
        gram: Of its inputs, in the weight basis.
        seconds: That it took.
        with_gains: Whether a global budget may follow, which needs them.
    """
    layer = cast(QuantizedLinear, get_linear(opened.model, target.name))
    packed = layer.packed()
    weight = opened.weight_in(layer.basis, target.name, device=gram.device)
    approximation = packed.dequantize(torch.float32)
    own = gram.in_hadamard_basis() if layer.basis == "hadamard" else gram
    record: Record = {
        "name": target.name,
        "block": target.block,
        "projection": target.projection,
        "shape": list(weight.shape),
        "error_ratio": layer_error(weight, approximation, own.matrix),
        "sqnr_db": sqnr_db(weight, approximation),
        "bits_per_weight": packed.bits_per_weight(),
        "digest": packed.digest(),
        "seconds": round(seconds, 4),
    }
    if with_gains:
        delta = weight - approximation
        delta = delta if layer.basis == "hadamard" else wht(delta)
        record["gains"] = measure_gains(delta, gram.in_hadamard_basis().damped(GAIN_DAMPING)).to_json()
    return record


def _put(opened: OpenModel, name: str, packed: PackedWeight) -> None:
    """Put a quantized layer in the place of a linear, the bias as it is stored."""
    has_bias = cast("nn.Parameter | None", get_linear(opened.model, name).bias) is not None
    stored = opened.weights.read(f"{name}.bias") if has_bias else None
    replace(opened.model, name, QuantizedLinear.from_packed(packed, stored))


def _restore_block(
    opened: OpenModel, block: Block, tensors: dict[str, Tensor], records: list[Record], *, format: QuantFormat
) -> None:
    """Put the quantized layers of a finished block back."""
    for record in records:
        name, (out_features, in_features) = cast(str, record["name"]), cast("list[int]", record["shape"])
        shape = (out_features, in_features)
        own = {key: tensors[f"{name}.{key}"] for key in format.shapes(shape)}
        _put(opened, name, PackedWeight(own, format, shape))
    block.module.to(block.device)


def _block_tensors(context: StageContext, opened: OpenModel, block: Block) -> dict[str, Tensor]:
    """Everything that a block's module keeps, by full name: packed tensors as they are, all else as the original stores it."""
    found: dict[str, Tensor] = {}
    packed = {
        f"{block.name}.{path}.{key}"
        for path, module in block.module.named_modules()
        if isinstance(module, QuantizedLinear)
        for key in module.packed().tensors
    }
    for name, tensor in block.module.state_dict(prefix=f"{block.name}.").items():
        # not the module's own: the walk may have cast it
        found[name] = tensor if name in packed else _as_stored(context, opened.weights.read(name))
    return found


def _outside_blocks(context: StageContext, opened: OpenModel, words: Words | None) -> list[Path]:
    """Write what lies outside the blocks (embeddings, norm, head), a file a tensor, and return the files."""
    prefixes = tuple(f"{name}." for name, _ in decoder_blocks(opened.model))
    tied = tied_names(opened.model)
    packed = {} if words is None else words.tensors()
    parts: list[Path] = []
    for name in opened.model.state_dict():
        if name.startswith(prefixes) or name in tied:
            continue
        path = context.work / f"outside-{len(parts)}.safetensors"
        write_tensors(path, {name: packed[name] if name in packed else _as_stored(context, opened.weights.read(name))})
        parts.append(path)
    return parts


def _as_stored(context: StageContext, tensor: Tensor) -> Tensor:
    """A tensor in the number format that the recipe wants what is not quantized in; its own if that is `auto`."""
    return tensor.to(context.dtype) if context.recipe.model.dtype != "auto" and tensor.is_floating_point() else tensor


def _stored_dtype(context: StageContext, opened: OpenModel) -> torch.dtype:
    return context.dtype if context.recipe.model.dtype != "auto" else opened.model.dtype


def _summary(records: list[Record], opened: OpenModel, words: Words | None) -> dict[str, object]:
    weights = [float(cast(list[int], r["shape"])[0] * cast(list[int], r["shape"])[1]) for r in records]
    errors = [cast(float, r["error_ratio"]) for r in records]
    bits = sum(cast(float, r["bits_per_weight"]) * n for r, n in zip(records, weights, strict=True)) / sum(weights)
    others = opened.num_parameters() + (0 if words is None else words.weights)
    worst = max(records, key=lambda r: cast(float, r["error_ratio"]))
    return {
        "layers": len(records),
        "weights": int(sum(weights)),
        "layer_error_mean": sum(errors) / len(errors),
        "layer_error_max": max(errors),
        "worst_layer": worst["name"],
        "sqnr_db_mean": sum(cast(float, r["sqnr_db"]) for r in records) / len(records),
        "bits_per_weight": bits,
        "megabytes_16_bit": (others + int(sum(weights))) * 2 / 1e6,
        "model_source": opened.source,
        "model_fingerprint": opened.fingerprint,
    }
