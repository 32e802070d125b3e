"""The quantize stage: a 16-bit model in, packed 2-, 3- or 4-bit codes out, block by block.

Calibration text runs through the already quantized blocks, so each layer is fitted to the inputs it will really see. Only one
block's full-precision weights and Gram matrices are on the device at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from qwha_cli import catalog
from qwha_cli.data.calibration import calibration_tokens
from qwha_cli.kernels.hadamard import plan as hadamard_plan
from qwha_cli.kernels.wht import wht
from qwha_cli.models.load import LoadedModel, load
from qwha_cli.models.targets import Target, find_targets
from qwha_cli.models.walk import walk
from qwha_cli.quant.checkpoint import save_base
from qwha_cli.quant.error import layer_error, sqnr_db
from qwha_cli.quant.gram import Gram
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import PackedWeight, QuantizerOptions, check_group
from qwha_cli.quant.swap import get_linear, replace
from qwha_cli.recipe.schema import Recipe
from qwha_cli.stages.context import StageContext, write_lines

Quantize = Callable[..., PackedWeight]


def run(context: StageContext) -> dict[str, object]:
    """Quantize the recipe's model and write it as a Hugging Face folder with layers.jsonl; return the summary."""
    recipe = context.recipe
    # In the checkpoint's own format, so that what is not quantized is stored as it was; the walk computes in the context's.
    own = None if recipe.model.dtype == "auto" else context.dtype
    loaded = load_original(context, dtype=own)
    targets = quantized_targets(loaded.model, recipe)
    context.progress(0, 1, "reading calibration text")
    tokens = calibration(context, loaded)
    by_block: dict[int, list[Target]] = {}
    for target in targets:
        by_block.setdefault(target.block, []).append(target)
    total = max(by_block) + 1
    records: list[dict[str, object]] = []
    batch_size = recipe.quantize.calibration.batch_size
    for block in walk(loaded.model, tokens, device=context.device, batch_size=batch_size, dtype=context.dtype):
        own = by_block.get(block.index, [])
        grams = block.grams([t.name for t in own])
        for target in own:
            records.append(_quantize_layer(context, loaded.model, target, grams[target.name]))
        context.progress(block.index + 1, total, block.name)
    write_lines(context.draft / "layers.jsonl", records)
    save_base(loaded.model, context.draft, tokenizer=loaded.tokenizer, format=_options(recipe).format)
    context.events.layers("quantize", records)
    return _summary(records, loaded)


def load_original(context: StageContext, *, dtype: torch.dtype | None) -> LoadedModel:
    """Load the recipe's 16-bit model on the CPU in a number format; None for the checkpoint's own."""
    model = context.recipe.model
    context.progress(0, 1, f"loading {model.id}")
    return load(model.id, revision=model.revision, dtype=dtype, seed=context.recipe.seed)


def calibration(context: StageContext, loaded: LoadedModel) -> Tensor:
    """Return the recipe's calibration tokens, int64 (samples, length)."""
    settings = context.recipe.quantize.calibration
    return calibration_tokens(
        data=settings.data,
        path=settings.path,
        split=settings.split,
        samples=settings.samples,
        length=settings.length,
        seed=context.recipe.seed,
        tokenizer=loaded.tokenizer,
    )


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


def note_blocks(context: StageContext, size: int) -> None:
    """Say so where a transform is block-diagonal because no Hadamard matrix of its whole size is known."""
    shape = hadamard_plan(size)
    if not shape.exact:
        context.note(f"no Hadamard matrix of order {size} is known here: {size // shape.block} blocks of {shape.block}")


def _quantize_layer(context: StageContext, model: nn.Module, target: Target, gram: Gram) -> dict[str, object]:
    """Replace one linear by its quantized form and return its record."""
    started = time.monotonic()
    recipe = context.recipe
    linear = get_linear(model, target.name)
    weight = linear.weight.detach().to(device=gram.device, dtype=torch.float32)
    gram.check_finite(target.name)
    if recipe.quantize.basis == "hadamard":
        note_blocks(context, linear.in_features)
        weight, gram = wht(weight), gram.in_hadamard_basis()
    quantize = cast(Quantize, catalog.load(catalog.QUANTIZERS[recipe.quantize.method]))
    packed = quantize(weight, gram, options=_options(recipe), name=target.name)
    approximation = packed.dequantize(torch.float32)
    record: dict[str, object] = {
        "name": target.name,
        "block": target.block,
        "projection": target.projection,
        "shape": list(weight.shape),
        "error_ratio": layer_error(weight, approximation, gram.matrix),
        "sqnr_db": sqnr_db(weight, approximation),
        "bits_per_weight": packed.bits_per_weight(),
        "seconds": round(time.monotonic() - started, 4),
    }
    replace(model, target.name, QuantizedLinear.from_packed(packed, linear.bias))
    return record


def _summary(records: list[dict[str, object]], loaded: LoadedModel) -> dict[str, object]:
    weights = [float(cast(list[int], r["shape"])[0] * cast(list[int], r["shape"])[1]) for r in records]
    errors = [cast(float, r["error_ratio"]) for r in records]
    bits = sum(cast(float, r["bits_per_weight"]) * n for r, n in zip(records, weights, strict=True)) / sum(weights)
    worst = max(records, key=lambda r: cast(float, r["error_ratio"]))
    return {
        "layers": len(records),
        "weights": int(sum(weights)),
        "layer_error_mean": sum(errors) / len(errors),
        "layer_error_max": max(errors),
        "worst_layer": worst["name"],
        "sqnr_db_mean": sum(cast(float, r["sqnr_db"]) for r in records) / len(records),
        "bits_per_weight": bits,
        "megabytes_16_bit": _megabytes_16_bit(loaded.model, int(sum(weights))),
        "model_source": loaded.source,
        "model_fingerprint": loaded.fingerprint,
    }


def _megabytes_16_bit(model: nn.Module, quantized: int) -> float:
    """Size of the model's weights stored in 16 bits, in MB (10^6): what is left as parameters plus the quantized linears."""
    return (sum(p.numel() for p in model.parameters()) + quantized) * 2 / 1e6
