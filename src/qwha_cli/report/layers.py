"""The records of layers.jsonl as people look at them: one number of every layer as a grid, and the worst layers first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwha_cli.errors import DataError

Records = Sequence[Mapping[str, object]]
# The usual order of a decoder block's linears; others follow by name.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class LayerGrid:
    """One number of every layer.

    Attributes:
        projections: Names of the rows, in the order of a decoder block.
        values: One row a projection with one value a block; None where there is no such layer or no number.
    """

    projections: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    @property
    def positive(self) -> list[float]:
        """The values above zero, which are those that a logarithmic scale can show."""
        return [value for row in self.values for value in row if value is not None and value > 0]


def layer_grid(layers: Records, value: str) -> LayerGrid:
    """Return a number of every layer, projections down and blocks across.

    Args:
        layers: Records with `block`, `projection` and the value.
        value: Name of the value, e.g. "error_after".

    Raises:
        DataError: No record has the value.
    """
    usable = [r for r in layers if isinstance(r.get(value), int | float) and isinstance(r.get("block"), int)]
    if not usable:
        raise DataError(f"no layer has a {value}", where="layers", remedy="run the stage that measures it again")
    order = {name: i for i, name in enumerate(_PROJECTIONS)}
    names = sorted({str(r["projection"]) for r in usable}, key=lambda n: (order.get(n, len(order)), n))
    found = {(str(r["projection"]), r["block"]): finite_number(r[value]) for r in usable}
    blocks = 1 + max(block for _, block in found if isinstance(block, int))
    return LayerGrid(tuple(names), tuple(tuple(found.get((name, block)) for block in range(blocks)) for name in names))


def worst_layers(layers: Records, value: str, *, count: int) -> list[Mapping[str, object]]:
    """Return the layers with the largest value, the largest first; of equals the earlier layer."""
    return sorted(layers, key=lambda layer: -(finite_number(layer.get(value)) or 0.0))[:count]


def common_prefix(layers: Records) -> str:
    """Return what all layers' names begin with, up to a dot, such as `model.layers.`; empty where they share nothing."""
    names = [str(layer.get("name", "")).split(".")[:-1] for layer in layers]
    shared: list[str] = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def finite_number(value: object) -> float | None:
    """Return a finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def entries_of_rows(record: Mapping[str, object], between: str) -> str:
    """Entries of the emptiest, median and fullest row; of a LoRA, which has no rows of its own, the rank."""
    if "rank" in record:
        return f"rank {record['rank']}"
    return between.join(f"{record.get(f'entries_{kind}', '–')}" for kind in ("min", "median", "max"))
