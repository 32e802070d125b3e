"""The init stage: choose the places and values of F from the quantization error, block by block.

The inputs that a layer's error is measured on are those of the compressed model with the adapters of all earlier blocks in
place, because that is what the layer will see. A layer that ends worse than with a zero adapter stops the run
(`init.gate: false` turns that into a note).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qwha_cli import catalog
from qwha_cli.adapters.build import add_adapter, save_adapter
from qwha_cli.adapters.spectral.base_layer import dense_linear
from qwha_cli.errors import GateError
from qwha_cli.initializers.budget import InitOptions
from qwha_cli.initializers.refine import residual_error
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.wht import wht
from qwha_cli.models.targets import Target, find_targets
from qwha_cli.models.walk import walk
from qwha_cli.quant.checkpoint import load_base
from qwha_cli.quant.gram import Gram
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.swap import get_linear, replace
from qwha_cli.report.entries import rows_by_entries, total_rows_by_entries
from qwha_cli.report.plots import entries_histogram, layer_heatmap
from qwha_cli.stages.context import StageContext, write_lines
from qwha_cli.stages.quantize import calibration, load_original, note_blocks

Initialize = Callable[..., SparseRows]


def run(context: StageContext) -> dict[str, object]:
    """Initialise the adapter of every target and write it as a peft folder with layers.jsonl and plots; return the summary."""
    recipe = context.recipe
    original = load_original(context, dtype=context.dtype)
    model = load_base(context.inputs["quantize"], dtype=context.dtype)
    targets = find_targets(
        model, targets=recipe.adapter.targets, exclude=list(recipe.adapter.exclude), kinds=(QuantizedLinear, nn.Linear)
    )
    tokens = calibration(context, original)
    by_block: dict[int, list[Target]] = {}
    for target in targets:
        by_block.setdefault(target.block, []).append(target)
    rows: dict[str, SparseRows] = {}
    records: list[dict[str, object]] = []
    borrowed: dict[str, nn.Module] = {}
    batch_size = recipe.quantize.calibration.batch_size
    for block in walk(model, tokens, device=context.device, batch_size=batch_size, dtype=context.dtype):
        _give_back(model, borrowed)
        own = by_block.get(block.index, [])
        grams = block.grams([t.name for t in own])
        for target in own:
            layer = _Layer(target, get_linear(model, target.name), get_linear(original.model, target.name).weight)
            rows[target.name], record = _initialize_layer(context, layer, grams[target.name])
            records.append(record)
            # The next block shall see this one corrected; the packed layer returns when the walk has gone on.
            borrowed[target.name] = layer.module
            replace(model, target.name, _corrected(layer, rows[target.name], recipe.adapter.scale))
        context.progress(block.index + 1, max(by_block) + 1, block.name)
    _give_back(model, borrowed)
    del original
    summary = _summary(records)
    context.events.layers("init", records)
    _check_gate(context, records)
    adapted = add_adapter(
        model, rank=recipe.adapter.rank, scale=recipe.adapter.scale, targets=[t.name for t in targets], rows=rows
    )
    save_adapter(adapted, context.draft, base=str(context.inputs["quantize"]))
    write_lines(context.draft / "layers.jsonl", records)
    layer_heatmap(records, "error_after", context.draft / "heatmap.png", title="Layer output error after initialisation")
    entries_histogram(total_rows_by_entries(records), context.draft / "entries.png")
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

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The base's weight (out, in) in its own basis."""
        if isinstance(self.module, QuantizedLinear):
            return self.module.dense(dtype)
        return cast(nn.Linear, self.module).weight.detach().to(dtype)


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
    error_after = residual_error(delta, places, gram_h) / energy
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
        "entries_histogram": rows_by_entries(counts.tolist()).to_json(),
        "error_zero": error_zero,
        "error_after": error_after,
        "seconds": round(time.monotonic() - started, 4),
    }
    scale = recipe.adapter.scale
    return places.with_values(places.values / scale), record


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


def _corrected(layer: _Layer, rows: SparseRows, scale: float) -> nn.Linear:
    """Return a plain linear that computes what the layer computes with its adapter."""
    sparse = rows.dense(torch.float32).to(layer.weight.device) * scale
    dense = layer.dense(torch.float32).to(sparse.device)
    merged = wht(dense + sparse, transpose=True) if layer.basis == "hadamard" else dense + wht(sparse, transpose=True)
    device = next(layer.module.buffers(), layer.weight).device
    bias = getattr(layer.module, "bias", None)
    return dense_linear(merged.to(device=device, dtype=layer.weight.dtype), bias)


def _give_back(model: nn.Module, borrowed: dict[str, nn.Module]) -> None:
    """Put the packed layers of the previous block back into the model, on the CPU."""
    for name, module in borrowed.items():
        replace(model, name, module.cpu())
    borrowed.clear()


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
