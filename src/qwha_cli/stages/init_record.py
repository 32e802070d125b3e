"""What the init stage writes of one layer: its errors before and after, its entries, and the errors of rivals at the same bytes.

The error is that of the layer's outputs on the calibration inputs, as a share of the outputs, measured on what will be stored.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from qwha_cli.adapters.build import Start
from qwha_cli.artifacts.blocks import Record
from qwha_cli.catalog import INITIALIZERS
from qwha_cli.kernels.low_rank import LowRank
from qwha_cli.quant.error import layer_error
from qwha_cli.quant.gram import Gram
from qwha_cli.recipe.schema import Recipe
from qwha_cli.report.entries import rows_by_entries
from qwha_cli.stages.init_layer import InitLayer
from qwha_cli.stages.init_low_rank import initialize_low_rank
from qwha_cli.stages.init_sparse import init_options, initialize_sparse

Kind = Literal["qwha", "lora"]
# of a sparse entry on disk, value and place, and of a number in a LoRA's factors in the same format
_BITS: dict[str, dict[Kind, int]] = {"bfloat16": {"qwha": 24, "lora": 16}, "float32": {"qwha": 40, "lora": 32}}


def start_record(recipe: Recipe, layer: InitLayer, start: Start, gram: Gram) -> Record:
    """The layer's line in layers.jsonl, but for the time it took."""
    error_zero, error_after = _errors(recipe, layer, gram, [None, start], low_rank=isinstance(start, LowRank))
    return {
        "name": layer.name,
        "block": layer.target.block,
        "projection": layer.target.projection,
        "shape": list(layer.shape),
        **_entries(start),
        "error_zero": error_zero,
        "error_after": error_after,
    }


def compared(recipe: Recipe, layer: InitLayer, gram: Gram, *, entries: int) -> Record:
    """The field `compare`: the errors of the initializers that `init.compare` names, on this layer and at its bytes on disk.

    A LoRA's numbers need no places, so at the bytes of a sparse adapter its rank is half as large again.
    """
    own = recipe.adapter.method
    rivals: dict[str, float] = {}
    for method in recipe.init.compare:
        if method == "zero":
            start: Start | None = None
        elif method in INITIALIZERS:
            same = numbers_at_same_bytes(recipe, entries, own=own, other="qwha")
            start = initialize_sparse(recipe, layer, gram, method=method, entries=same)
        else:
            rank = numbers_at_same_bytes(recipe, entries, own=own, other="lora") // sum(layer.shape)
            start = initialize_low_rank(recipe, layer, gram, method=method, rank=max(1, min(*layer.shape, rank)))
        rivals[method] = _error(recipe, layer, start, gram)
    return {"compare": rivals} if rivals else {}


def numbers_at_same_bytes(recipe: Recipe, entries: int, *, own: Kind, other: Kind) -> int:
    """How many entries, or numbers in both factors, another kind of adapter has at the bytes of `entries`; rounded down."""
    bits = _BITS[recipe.adapter.store]
    return entries * bits[own] // bits[other]


def _entries(start: Start) -> Record:
    if isinstance(start, LowRank):
        return {"rank": start.rank, "entries": start.num_values}
    counts = start.counts()
    return {
        "entries": int(start.values.numel()),
        "entries_min": int(counts.min()),
        "entries_median": int(counts.median()),
        "entries_max": int(counts.max()),
        "entries_histogram": rows_by_entries(counts.tolist()).to_json(),
    }


def _error(recipe: Recipe, layer: InitLayer, start: Start | None, gram: Gram) -> float:
    low_rank = isinstance(start, LowRank) or (start is None and recipe.adapter.method == "lora")
    return _errors(recipe, layer, gram, [start], low_rank=low_rank)[0]


def _errors(recipe: Recipe, layer: InitLayer, gram: Gram, starts: list[Start | None], *, low_rank: bool) -> list[float]:
    """Of the layer with each start, in the Hadamard basis, where both the codes and F are cheap; LoRAs in their own."""
    dtype = init_options(recipe).torch_dtype
    weight, base = layer.pair("weight" if low_rank else "hadamard", device=gram.device, dtype=dtype)
    matrix = (gram if low_rank else gram.in_hadamard_basis()).matrix.to(dtype)

    def corrected(start: Start) -> Tensor:
        return base + recipe.adapter.scale * start.to(gram.device).dense(dtype)

    return [layer_error(weight, base if start is None else corrected(start), matrix) for start in starts]
