"""Integer grids: scale and zero point of every group of a row, and rounding to them.

A group's values are scale · (code − zero), 0 <= code < 2^bits. Scales are float16 as stored, and codes are chosen with the
rounded scale, so what is stored is what was optimised. `minmax` spans the group's extremes (and zero). `search` tries 30 shrunken
spans, for asymmetric grids with the neighbouring integer zero points too, and keeps the grid with the least sum of
importance · |error|^2.4; importance is the diagonal of the Gram matrix (shrinking and power: those of GPTQ's own clip search).
Rows are taken a few at a time, so that the trial grids work inside the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwha_cli.errors import NumericsError
from qwha_cli.quant.packed import QuantizerOptions, check_group

_SHRINK_STEPS = 30
_SMALLEST_SHRINK = 0.4
_POWER = 2.4
# float16's smallest positive number: a scale below it would be stored as zero
_SMALLEST_SCALE = 2.0**-24
# weights a pass of the search looks at on a CPU: three float32 temporaries of this size fit the second-level cache
_CACHE_WEIGHTS = 1 << 16
_DEVICE_WEIGHTS = 1 << 25


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales and zero points of a matrix.

    Args:
        scales: float16 (out, groups), positive.
        zeros: uint8 (out, groups), each < 2^bits.
        bits: Bits a code.
    """

    scales: Tensor
    zeros: Tensor
    bits: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest code of every weight: uint8 (out, in), from floating (out, in)."""
        grouped = weight.reshape(*self.scales.shape, -1)
        codes = nearest_codes(grouped, self.scales.float().unsqueeze(-1), self.zeros.float().unsqueeze(-1), bits=self.bits)
        return codes.to(torch.uint8).view(weight.shape)


def nearest_codes(values: Tensor, scales: Tensor, zeros: Tensor, *, bits: int) -> Tensor:
    """round(value / scale) + zero, clamped to the grid; all float32, broadcast together; halves round to even.

    Every quantizer rounds by this one function, so that two that should agree do so to the last bit.
    """
    return (values / scales).round_().add_(zeros).clamp_(0, (1 << bits) - 1)


def find_grid(weight: Tensor, *, options: QuantizerOptions, name: str, importance: Tensor | None = None) -> Grid:
    """Choose scale and zero point of every group.

    Args:
        weight: float32 (out, in).
        options: bits, group_size, symmetric and grid are used.
        name: The layer, for errors.
        importance: float (in,), not negative, same device: how much an input's error counts in the search; None for equal.

    Raises:
        ModelError: The inputs are no whole number of groups.
        NumericsError: A weight is not finite, or too large for a float16 scale.
    """
    out_features, in_features = weight.shape
    check_group(name, in_features, options.group_size)
    grouped = weight.reshape(out_features, -1, options.group_size)
    low, high = _span(grouped, symmetric=options.symmetric)
    if options.grid == "minmax":
        scales, zeros = _grid_of(low, high, options=options)
    else:
        scales, zeros = _search(grouped, low, high, importance=importance, options=options)
    stored = scales.to(torch.float16)
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError(
            "a weight is not finite, or too large for a float16 scale",
            where=f"layer {name}",
            remedy="load the model with model.dtype=float32, or keep the layer in 16 bits with quantize.exclude",
        )
    return Grid(stored, zeros.to(torch.uint8), options.bits)


def gram_importance(gram: Tensor | None) -> Tensor | None:
    """The Gram matrix's diagonal relative to its mean, (in,); None for no gram, or one without any input energy."""
    if gram is None:
        return None
    diagonal = gram.diagonal().clamp_min(0)
    mean = diagonal.mean()
    return diagonal / mean if float(mean) > 0 else None


def _span(grouped: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Lowest and highest value that the grid of each group should reach, (out, groups); zero is always between them."""
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def _grid_of(low: Tensor, high: Tensor, *, options: QuantizerOptions) -> tuple[Tensor, Tensor]:
    """Scales (already rounded to float16, as float32) and zeros (float32) of a span."""
    top = (1 << options.bits) - 1
    scales = ((high - low) / top).clamp_min(_SMALLEST_SCALE).to(torch.float16).float()
    if options.symmetric:
        return scales, torch.full_like(scales, 1 << (options.bits - 1))
    return scales, (-low / scales).round_().clamp_(0, top)


def _search(
    grouped: Tensor, low: Tensor, high: Tensor, *, importance: Tensor | None, options: QuantizerOptions
) -> tuple[Tensor, Tensor]:
    """`_search_rows` over a few rows at a time; a row's result does not depend on which rows go with it."""
    _, groups, group_size = grouped.shape
    weights = None if importance is None else importance.to(grouped.dtype).view(groups, group_size)
    budget = _CACHE_WEIGHTS if grouped.device.type == "cpu" else _DEVICE_WEIGHTS
    rows = max(1, budget // (groups * group_size))
    found = [
        _search_rows(part, lo, hi, importance=weights, options=options)
        for part, lo, hi in zip(grouped.split(rows), low.split(rows), high.split(rows), strict=True)
    ]
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def _search_rows(
    grouped: Tensor, low: Tensor, high: Tensor, *, importance: Tensor | None, options: QuantizerOptions
) -> tuple[Tensor, Tensor]:
    """The best of all shrunken grids, (rows, groups) each; of equally good ones the first, so of an all-zero group the widest."""
    top = (1 << options.bits) - 1
    best_scales, best_zeros = _grid_of(low, high, options=options)
    best = torch.full_like(low, torch.inf)
    for step in range(_SHRINK_STEPS):
        shrink = 1 - step / (_SHRINK_STEPS - 1) * (1 - _SMALLEST_SHRINK)
        scales, middle = _grid_of(low * shrink, high * shrink, options=options)
        levels = (grouped / scales.unsqueeze(-1)).round_()
        for shift in (0,) if options.symmetric else (0, -1, 1):
            zeros = (middle + shift).clamp_(0, top)
            cost = _cost(grouped, levels, scales, zeros, importance=importance, top=top)
            better = cost < best
            best = torch.where(better, cost, best)
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def _cost(grouped: Tensor, levels: Tensor, scales: Tensor, zeros: Tensor, *, importance: Tensor | None, top: int) -> Tensor:
    """Σ importance · |error|^2.4 of each group when `levels`, the values over the scale, are clipped to the grid."""
    # maximum and minimum are ten times as fast as clamp with tensors for bounds, exp2 and log2 three times as fast as pow;
    # an error of 0 goes through −inf and comes out as 0
    lowest = -zeros.unsqueeze(-1)
    clipped = torch.maximum(levels, lowest).minimum(lowest + top)
    error = clipped.mul_(scales.unsqueeze(-1)).sub_(grouped).abs_().log2_().mul_(_POWER).exp2_()
    return (error if importance is None else error.mul_(importance)).sum(-1)
