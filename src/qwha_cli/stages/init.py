"""The init stage: choose the places and values of F from the quantization error, block by block.

The inputs that a layer's error is measured on are those of the compressed model with the adapters of all earlier blocks in
place, because that is what the layer will see. A layer that ends worse than with a zero adapter stops the run
(`init.gate: false` turns that into a note).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from qwha_cli import catalog
from qwha_cli.adapters.build import add_adapter, as_stored, save_adapter
from qwha_cli.adapters.size import size_summary
from qwha_cli.adapters.spectral.base_layer import dense_linear
from qwha_cli.artifacts.blocks import FinishedBlocks, Record
from qwha_cli.errors import ArtifactError, GateError
from qwha_cli.initializers.budget import InitOptions
from qwha_cli.initializers.refine import residual_error
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.wht import wht
from qwha_cli.models.stream import open_base
from qwha_cli.models.targets import Target, find_targets
from qwha_cli.models.walk import Block
from qwha_cli.quant.gram import Gram
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.swap import get_linear, replace
from qwha_cli.report.plots import entries_histogram, layer_heatmap
from qwha_cli.stages.context import StageContext, read_lines, write_lines
from qwha_cli.stages.quantize import by_block, calibration, finished_blocks, note_blocks, open_original, walk_through

Initialize = Callable[..., SparseRows]


def run(context: StageContext) -> dict[str, object]:
    """Initialise the adapter of every target and write it as a peft folder with layers.jsonl and plots; return the summary."""
    recipe = context.recipe
    original, base = open_original(context), open_base(context.inputs["quantize"])
    targets = find_targets(
        base.model, targets=recipe.adapter.targets, exclude=list(recipe.adapter.exclude), kinds=(QuantizedLinear, nn.Linear)
    )
    own = by_block(targets)
    tokens = calibration(context, original.tokenizer)
    finished = finished_blocks(context)
    digests = {r["name"]: r["digest"] for r in read_lines(context.inputs["quantize"] / "layers.jsonl")}
    rows: dict[str, SparseRows] = {}
    records: list[Record] = []
    for block in walk_through(context, base, tokens):
        layers = [
            _Layer(target, get_linear(base.model, target.name), original.weight(target.name))
            for target in own.get(block.index, [])
        ]
        for layer in layers:
            layer.check(digests.get(layer.target.name), context.inputs["quantize"])
        kept = finished.records(block.index)
        if kept is None:
            kept = _initialize_block(context, block, layers, finished)
        records += kept
        found = _rows(finished.tensors(block.index), layers)
        rows |= found
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
        rows=rows,
        fingerprint=base.fingerprint,
        store=recipe.adapter.store,
    )
    save_adapter(adapted, context.draft, base=str(context.inputs["quantize"]))
    quantized = context.manifests["quantize"].results
    summary |= size_summary(
        context.draft,
        entries=cast(int, summary["entries"]),
        base_bits_per_weight=cast(float, quantized["bits_per_weight"]),
        weights=cast(int, quantized["weights"]),
    )
    write_lines(context.draft / "layers.jsonl", records)
    layer_heatmap(records, "error_after", context.draft / "heatmap.png", title="Layer output error after initialisation")
    entries_histogram(records, context.draft / "entries.png")
    return summary


@dataclass(frozen=True)
class _Layer:
    """One target: its quantized module and its 16-bit weight (out, in)."""

    target: Target
    module: nn.Module
    weight: Tensor

    @property
    def basis(self) -> str:
        return self.module.basis if isinstance(self.module, QuantizedLinear) else "weight"

    def check(self, digest: object, folder: Path) -> None:
        """Refuse codes that are not those that the quantize stage wrote."""
        if isinstance(self.module, QuantizedLinear) and self.module.packed().digest() != digest:
            raise ArtifactError(
                f"the codes of layer {self.target.name} are damaged: their digest is not the one in layers.jsonl",
                where=str(folder),
                remedy="quantize the model again with `qwha quantize RECIPE --force`",
            )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The base's weight (out, in) in its own basis."""
        if isinstance(self.module, QuantizedLinear):
            return self.module.dense(dtype)
        return cast(nn.Linear, self.module).weight.detach().to(dtype)


def _initialize_block(context: StageContext, block: Block, layers: list[_Layer], finished: FinishedBlocks) -> list[Record]:
    """Initialise the layers of a block, keep their rows, and return its records."""
    grams = block.grams([layer.target.name for layer in layers])
    tensors: dict[str, Tensor] = {}
    records: list[Record] = []
    for layer in layers:
        rows, record = _initialize_layer(context, layer, grams[layer.target.name])
        parts = {"row_starts": rows.row_starts, "columns": rows.columns, "values": rows.values}
        tensors |= {f"{layer.target.name}.{key}": tensor for key, tensor in parts.items()}
        records.append(record)
    finished.save(block.index, tensors, records)
    return records


def _rows(tensors: dict[str, Tensor], layers: list[_Layer]) -> dict[str, SparseRows]:
    """The rows that `_initialize_block` kept, by layer."""
    return {
        name: SparseRows(
            tensors[f"{name}.row_starts"],
            tensors[f"{name}.columns"],
            tensors[f"{name}.values"],
            (layer.weight.shape[0], layer.weight.shape[1]),
        )
        for layer in layers
        for name in [layer.target.name]
    }


def _advance_corrected(
    context: StageContext, model: nn.Module, block: Block, layers: list[_Layer], rows: Mapping[str, SparseRows]
) -> None:
    """Let the next block see this one corrected, and put the packed layers back."""
    for layer in layers:
        replace(model, layer.target.name, _corrected(layer, rows[layer.target.name], context))
    if not block.last:
        block.advance()
    for layer in layers:
        replace(model, layer.target.name, layer.module)


def _initialize_layer(context: StageContext, layer: _Layer, gram: Gram) -> tuple[SparseRows, dict[str, object]]:
    started = time.monotonic()
    recipe = context.recipe
    dtype = torch.float64 if recipe.init.precision == "float64" else torch.float32
    out_features, in_features = layer.weight.shape
    note_blocks(context, in_features)
    gram_h = gram.in_hadamard_basis().matrix.to(dtype)
    weight_h = wht(layer.weight.detach().to(device=gram.device, dtype=dtype))
    dense = layer.dense(torch.float32).to(device=gram.device, dtype=dtype)
    delta = weight_h - (dense if layer.basis == "hadamard" else wht(dense))
    budget = min(recipe.adapter.rank * (in_features + out_features), in_features * out_features)
    initialize = cast(Initialize, catalog.load(catalog.INITIALIZERS[recipe.init.method]))
    places = initialize(delta, gram_h, budget=budget, options=_options(context))
    energy = _energy(weight_h, gram_h)
    error_zero = _energy(delta, gram_h) / energy
    scale = recipe.adapter.scale
    rows = as_stored(places.with_values(places.values / scale), recipe.adapter.store)
    error_after = residual_error(delta, rows.with_values(rows.values * scale), gram_h) / energy
    counts = places.counts()
    record: dict[str, object] = {
        "name": layer.target.name,
        "block": layer.target.block,
        "projection": layer.target.projection,
        "shape": [out_features, in_features],
        "entries": int(places.values.numel()),
        "entries_min": int(counts.min()),
        "entries_median": int(counts.median()),
        "entries_max": int(counts.max()),
        "error_zero": error_zero,
        "error_after": error_after,
        "seconds": round(time.monotonic() - started, 4),
    }
    return rows, record


def _options(context: StageContext) -> InitOptions:
    init = context.recipe.init
    return InitOptions(
        temperature=init.temperature,
        damping=init.damping,
        min_per_row=init.min_per_row,
        seed=context.recipe.seed,
        dtype=init.precision,
    )


def _energy(matrix: Tensor, gram: Tensor) -> float:
    """tr(M G Mᵀ), the squared output norm of a matrix (out, in) over the calibration inputs."""
    return float(((matrix @ gram) * matrix).sum(dtype=torch.float64))


def _corrected(layer: _Layer, rows: SparseRows, context: StageContext) -> nn.Linear:
    """Return a plain linear that computes what the layer computes with its adapter."""
    sparse = rows.to(context.device).dense(torch.float32) * context.recipe.adapter.scale
    dense = layer.dense(torch.float32).to(context.device)
    merged = wht(dense + sparse, transpose=True) if layer.basis == "hadamard" else dense + wht(sparse, transpose=True)
    bias = getattr(layer.module, "bias", None)
    return dense_linear(merged.to(context.dtype), bias)


def _check_gate(context: StageContext, records: list[dict[str, object]]) -> None:
    worse = [r for r in records if cast(float, r["error_after"]) > cast(float, r["error_zero"]) * (1 + 1e-6)]
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
