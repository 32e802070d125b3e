"""How many entries each layer's adapter gets: those of its rank, or a share of all by what they gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from qwha_cli.artifacts.blocks import Record
from qwha_cli.initializers.global_budget import Gains, share_globally
from qwha_cli.models.sensitivity import Sensitivity
from qwha_cli.recipe.schema import Recipe


def budgets(
    recipe: Recipe, shapes: Mapping[str, tuple[int, int]], quantized: Mapping[str, Record], sensitivity: Sensitivity | None
) -> dict[str, int]:
    """The entries of each target.

    Args:
        recipe: adapter.rank, init.budget and init.min_per_row are read.
        shapes: Layer to (out, in), of all targets.
        quantized: Layer to its line in the quantize stage's layers.jsonl, with its `gains`.
        sensitivity: What the loss minds; needed for a global budget.

    Returns:
        Layer to entries: rank · (in + out), or as many in total. Layers that are not quantized have no error to share by and
        keep their own.
    """
    own = {name: min(recipe.adapter.rank * sum(shape), shape[0] * shape[1]) for name, shape in shapes.items()}
    if recipe.init.budget == "per_layer" or recipe.adapter.method == "lora":
        return own
    assert sensitivity is not None, "the recipe refuses a global budget without it"
    names = [name for name in shapes if name in quantized]
    shared = share_globally(
        {name: Gains.from_json(cast("dict[str, object]", quantized[name]["gains"])) for name in names},
        {name: sensitivity.means[name] for name in names},
        total=sum(own[name] for name in names),
        least={name: shapes[name][0] * min(recipe.init.min_per_row, shapes[name][1]) for name in names},
        most={name: shapes[name][0] * shapes[name][1] for name in names},
    )
    return own | shared
