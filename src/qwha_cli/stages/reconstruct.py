"""Block-wise reconstruction in the stages: trainable layers go into the block, are trained, and come back as what is stored.

What is kept is judged by what is stored, scales and values rounded: a block that did not get better stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch import nn

from qwha_cli.adapters.build import ADAPTER, Start, as_stored
from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.models.sensitivity import Sensitivity
from qwha_cli.models.stream import OpenModel
from qwha_cli.models.targets import Target
from qwha_cli.models.walk import Block
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.swap import get_linear, replace
from qwha_cli.quant.trainable import TrainableQuantizedLinear
from qwha_cli.stages.context import StageContext
from qwha_cli.stages.init_layer import InitLayer
from qwha_cli.training.reconstruct import Reconstruction

# relative for scales and values, in codes for zeros and roundings; those that the measured runs had, no others were compared
_GRID_RATE = 2e-3
_ROUNDING_RATE = 5e-3
_VALUES_RATE = 2e-3

Errors = dict[str, float]
"""`block_error_before` and `block_error`, of the block's output against the 16-bit model's."""


def reconstruct_base(
    context: StageContext, opened: OpenModel, block: Block, targets: list[Target], sensitivity: Sensitivity | None
) -> Errors:
    """Train the grids of a block's quantized layers, and with `full` their rounding; the better layers stay."""
    section = context.recipe.quantize
    before = {target.name: cast(QuantizedLinear, get_linear(opened.model, target.name)) for target in targets}
    layers = {
        name: TrainableQuantizedLinear(
            layer,
            weight=opened.weight_in(layer.basis, name, device=block.device) if section.reconstruct == "full" else None,
        )
        for name, layer in before.items()
    }
    reconstruction = _reconstruction(block, sensitivity)

    def train() -> dict[str, QuantizedLinear]:
        _put(opened.model, layers)
        rates = [pair for layer in layers.values() for pair in layer.learning_rates(grid=_GRID_RATE, rounding=_ROUNDING_RATE)]
        reconstruction.train(rates, epochs=section.reconstruct_epochs, seed=context.recipe.seed)
        return {name: QuantizedLinear.from_packed(layer.packed(), layer.bias) for name, layer in layers.items()}

    return _keep_the_better(opened.model, reconstruction, before, train)[0]


def reconstruct_values(
    context: StageContext,
    model: nn.Module,
    block: Block,
    layers: list[InitLayer],
    starts: Mapping[str, Start],
    sensitivity: Sensitivity | None,
) -> tuple[dict[str, Start], Errors]:
    """Train the values of a block's sparse adapters on the frozen base; the model is left as it was.

    Returns:
        The starts as they will be stored, and the block's errors.
    """
    recipe = context.recipe
    adapted: dict[str, SpectralLinear] = {}
    rates: list[tuple[nn.Parameter, float]] = []
    for layer in layers:
        module = SpectralLinear(layer.module)
        start = cast(SparseRows, starts[layer.name])
        module.update_layer(ADAPTER, start=start, scale=recipe.adapter.scale, transform="wht")
        module.keep = "speed"
        adapted[layer.name] = module
        rates.append((module.qwha_values[ADAPTER], _VALUES_RATE * float(start.values.abs().mean())))
    reconstruction = _reconstruction(block, sensitivity)

    def train() -> dict[str, SpectralLinear]:
        reconstruction.train(rates, epochs=recipe.init.reconstruct_epochs, seed=recipe.seed)
        for module in adapted.values():
            module.set_rows(ADAPTER, as_stored(module.rows(ADAPTER), recipe.adapter.store))
        return adapted

    _put(model, adapted)
    errors, better = _keep_the_better(model, reconstruction, adapted, train)
    _put(model, {layer.name: layer.module for layer in layers})
    return {name: module.rows(ADAPTER) for name, module in adapted.items()} if better else dict(starts), errors


def _reconstruction(block: Block, sensitivity: Sensitivity | None) -> Reconstruction:
    return Reconstruction(block, None if sensitivity is None else sensitivity.tokens[block.name])


def _keep_the_better(
    model: nn.Module,
    reconstruction: Reconstruction,
    before: Mapping[str, nn.Module],
    train: Callable[[], Mapping[str, nn.Module]],
) -> tuple[Errors, bool]:
    """Train, and put back what was there where that was better."""
    error_before = reconstruction.error()
    _put(model, train())
    error_after = reconstruction.error()
    better = error_after < error_before
    if not better:
        _put(model, before)
    return {"block_error_before": error_before, "block_error": error_after if better else error_before}, better


def _put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        replace(model, name, layer)
