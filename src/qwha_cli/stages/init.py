"""The init stage: choose the places and values of F from the quantization error, block by block.

The inputs that a layer's error is measured on are those of the compressed model with the adapters of all earlier blocks in
place, because that is what the layer will see. A layer that ends worse than with a zero adapter stops the run
(`init.gate: false` turns that into a note).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import cast

from torch import nn

from qwha_cli.adapters.build import Start, add_adapter, save_adapter
from qwha_cli.adapters.size import size_summary
from qwha_cli.artifacts.blocks import FinishedBlocks, Record
from qwha_cli.errors import GateError
from qwha_cli.models.sensitivity import Sensitivity
from qwha_cli.models.stream import open_base
from qwha_cli.models.targets import find_targets
from qwha_cli.models.walk import Block
from qwha_cli.quant.gram import Gram
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.swap import get_linear, replace
from qwha_cli.report.entries import total_rows_by_entries
from qwha_cli.report.plots import entries_histogram, layer_heatmap
from qwha_cli.stages.calibrated import (
    by_block,
    calibration,
    finished_blocks,
    kept_sensitivity,
    note_blocks,
    note_devices,
    open_original,
    walk_through,
)
from qwha_cli.stages.context import StageContext, read_lines, write_lines
from qwha_cli.stages.init_budget import budgets
from qwha_cli.stages.init_layer import InitLayer, start_of, start_tensors
from qwha_cli.stages.init_low_rank import initialize_low_rank
from qwha_cli.stages.init_record import compared, start_record
from qwha_cli.stages.init_sparse import initialize_sparse
from qwha_cli.stages.reconstruct import reconstruct_values
from qwha_cli.stages.spread import spread


def run(context: StageContext) -> dict[str, object]:
    """Initialise the adapter of every target and write it as a peft folder with layers.jsonl and plots; return the summary."""
    recipe = context.recipe
    original, base = open_original(context), open_base(context.inputs["quantize"])
    targets = find_targets(
        base.model, targets=recipe.adapter.targets, exclude=list(recipe.adapter.exclude), kinds=(QuantizedLinear, nn.Linear)
    )
    own = by_block(base.model, targets)
    tokens = calibration(context, original.tokenizer)
    finished = finished_blocks(context)
    quantized = {cast(str, r["name"]): r for r in read_lines(context.inputs["quantize"] / "layers.jsonl")}
    sensitivity = kept_sensitivity(context)
    entries = budgets(recipe, {t.name: original.shape(t.name) for t in targets}, quantized, sensitivity)
    starts: dict[str, Start] = {}
    records: list[Record] = []
    beside = original if recipe.init.reconstruct != "none" else None
    for block in walk_through(context, base, tokens, original=beside):
        # the weights of one block are on the device for its turn: each is needed several times, and the way there is long
        layers = [
            InitLayer(target, get_linear(base.model, target.name), original.weight(target.name).to(context.device))
            for target in own[block.index]
        ]
        for layer in layers:
            layer.check(quantized.get(layer.name, {}).get("digest"), context.inputs["quantize"])
        kept = finished.records(block.index)
        if kept is None:
            kept = _initialize_block(context, base.model, block, layers, finished, entries, sensitivity)
        records += kept
        tensors = finished.tensors(block.index)
        found = {layer.name: start_of(tensors, layer) for layer in layers}
        starts |= found
        _advance_corrected(context, base.model, block, layers, found)
        context.progress(block.index + 1, len(own), block.name)
    summary = _summary(records)
    context.events.layers("init", records)
    _check_gate(context, records)
    adapted = add_adapter(
        base.model,
        rank=recipe.adapter.rank,
        scale=recipe.adapter.scale,
        targets=[t.name for t in targets],
        start=starts,
        fingerprint=base.fingerprint,
        store=recipe.adapter.store,
    )
    save_adapter(adapted, context.draft, base=str(context.inputs["quantize"]), fingerprint=base.fingerprint)
    of_base = context.manifests["quantize"].results
    summary |= size_summary(
        context.draft,
        entries=cast(int, summary["entries"]),
        base_bits_per_weight=cast(float, of_base["bits_per_weight"]),
        weights=cast(int, of_base["weights"]),
    )
    write_lines(context.draft / "layers.jsonl", records)
    layer_heatmap(records, "error_after", context.draft / "heatmap.png", title="Layer output error after initialisation")
    if rows := total_rows_by_entries(records):
        entries_histogram(rows, context.draft / "entries.png")
    return summary


def _initialize_block(
    context: StageContext,
    model: nn.Module,
    block: Block,
    layers: list[InitLayer],
    finished: FinishedBlocks,
    entries: Mapping[str, int],
    sensitivity: Sensitivity | None,
) -> list[Record]:
    """Initialise the layers of a block, keep their starts, and return its records."""
    recipe = context.recipe
    grams = block.grams([layer.name for layer in layers], token_weights=sensitivity.tokens if sensitivity else None)
    by_name = {layer.name: layer for layer in layers}
    for layer in layers:
        note_blocks(context, layer.shape[1])
    note_devices(context)

    def initialize(name: str, gram: Gram) -> tuple[Start, float]:
        started = time.monotonic()
        layer = by_name[name].on(gram.device)
        if recipe.adapter.method == "qwha":
            start: Start = initialize_sparse(recipe, layer, gram, entries=entries[name])
        else:
            start = initialize_low_rank(recipe, layer, gram)
        return start, time.monotonic() - started

    found = spread({layer.name: layer.shape for layer in layers}, initialize, grams=grams, devices=context.devices)
    starts: dict[str, Start] = {name: start.to(context.device) for name, (start, _) in found.items()}
    seconds = {name: spent for name, (_, spent) in found.items()}
    errors: dict[str, float] = {}
    if recipe.init.reconstruct != "none":
        started = time.monotonic()
        starts, errors = reconstruct_values(context, model, block, layers, starts, sensitivity)
        share = (time.monotonic() - started) / max(1, len(layers))
        seconds = {name: own + share for name, own in seconds.items()}
    records = [
        start_record(recipe, layer, starts[layer.name], grams[layer.name])
        | errors
        | {"seconds": round(seconds[layer.name], 4)}
        | compared(recipe, layer, grams[layer.name], entries=entries[layer.name])
        for layer in layers
    ]
    tensors = {key: tensor for layer in layers for key, tensor in start_tensors(layer.name, starts[layer.name]).items()}
    finished.save(block.index, tensors, records)
    return records


def _advance_corrected(
    context: StageContext, model: nn.Module, block: Block, layers: list[InitLayer], starts: Mapping[str, Start]
) -> None:
    """Let the next block see this one corrected, and put the packed layers back."""
    scale = context.recipe.adapter.scale
    for layer in layers:
        corrected = layer.corrected(starts[layer.name], scale=scale, device=context.device, dtype=context.dtype)
        replace(model, layer.name, corrected)
    if not block.last:
        block.advance()
    for layer in layers:
        replace(model, layer.name, layer.module)


def _check_gate(context: StageContext, records: list[dict[str, object]]) -> None:
    # after a reconstruction the block is what counts, and it never gets worse
    judged = [r for r in records if "block_error" not in r]
    worse = [r for r in judged if cast(float, r["error_after"]) > cast(float, r["error_zero"]) * (1 + 1e-6)]
    if not worse:
        return
    first = worse[0]
    message = (
        f"{len(worse)} of {len(records)} layers are worse than with a zero adapter, first {first['name']} "
        f"({first['error_zero']:.4g} -> {first['error_after']:.4g})"
    )
    if context.recipe.init.gate:
        raise GateError(
            message, where="init", remedy="raise init.damping or the calibration samples; init.gate=false goes on regardless"
        )
    context.note(message)


def _summary(records: list[dict[str, object]]) -> dict[str, object]:
    zero = statistics.fmean(cast(float, r["error_zero"]) for r in records)
    after = statistics.fmean(cast(float, r["error_after"]) for r in records)
    return {
        "layers": len(records),
        "entries": sum(cast(int, r["entries"]) for r in records),
        "layer_error_zero_mean": zero,
        "layer_error_mean": after,
        "layer_error_max": max(cast(float, r["error_after"]) for r in records),
        "error_recovered": 1 - after / zero if zero else 0.0,
    }
