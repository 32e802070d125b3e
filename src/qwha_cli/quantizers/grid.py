"""Integer grids: scale and zero point of every group of a row, and rounding to them.

A group's values are scale · (code − zero), 0 <= code < 2^bits. Scales are float16 as stored, and codes are chosen with the
rounded scale, so what is stored is what was optimised. Zero points are integers, or `fine`: multiples of 2^(bits − 4), so that
they take four bits whatever the codes take. Four equal steps suit a bell-shaped group best around a zero of 1.5, which no integer
is: at 2 bits fine zero points take a seventh off the error for 0.03 bits a weight.

`minmax` spans the group's extremes (an integer grid also zero). `search` tries 30 shrunken spans with neighbouring zero points,
and keeps the grid with the least sum of importance · |error|^p; importance is the diagonal of the Gram matrix. p is 2.4 for
integer zero points (shrinking and power: those of GPTQ's own clip search), and 2 for fine ones, where it measures better. Rows
are taken a few at a time, so that the trial grids work inside the processor's cache.
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
# zero points tried around the middle of the span
_INTEGER_SHIFTS = (0.0, -1.0, 1.0)
_FINE_SHIFTS = (0.0, -0.5, 0.5, -0.25, 0.25, -1.0, 1.0)
# float16's smallest positive number: a scale below it would be stored as zero
_SMALLEST_SCALE = 2.0**-24
# weights a pass of the search looks at on a CPU: three float32 temporaries of this size fit the second-level cache
_CACHE_WEIGHTS = 1 << 16
_DEVICE_WEIGHTS = 1 << 23


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales and zero points of a matrix.

    Args:
        scales: float16 (out, groups), positive.
        zeros: float32 (out, groups), multiples of 2^(bits − zero_bits), each at least 0 and below 2^bits.
        bits: Bits a code.
        zero_bits: Bits a stored zero point.
        group_size: Inputs a group.
    """

    scales: Tensor
    zeros: Tensor
    bits: int
    zero_bits: int
    group_size: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest code of every weight: uint8 (out, in), from floating (out, in)."""
        grouped = weight.reshape(*self.scales.shape, -1)
        codes = nearest_codes(grouped, self.scales.float().unsqueeze(-1), self.zeros.unsqueeze(-1), bits=self.bits)
        return codes.to(torch.uint8).view(weight.shape)

    def values(self, codes: Tensor) -> Tensor:
        """What codes (out, in) stand for, float32 (out, in)."""
        grouped = codes.float().view(*self.scales.shape, -1)
        return grouped.sub_(self.zeros.unsqueeze(-1)).mul_(self.scales.float().unsqueeze(-1)).view(codes.shape)

    def by_group(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros float32 (groups, out), for work on the transpose."""
        return self.scales.float().T.contiguous(), self.zeros.T.contiguous()

    def with_groups(self, scales: Tensor, zeros: Tensor) -> Grid:
        """The same kind of grid with other scales and zeros (groups, out) that can be stored."""
        return Grid(scales.T.to(torch.float16).contiguous(), zeros.T.contiguous(), self.bits, self.zero_bits, self.group_size)

    def storable_scale(self, scales: Tensor) -> Tensor:
        """The nearest scales that float16 holds and that are positive, as float32."""
        return _storable_scale(scales)

    def storable_zero(self, zeros: Tensor) -> Tensor:
        """The nearest zero points that fit `zero_bits`."""
        return _storable_zero(zeros, bits=self.bits, zero_bits=self.zero_bits)


def nearest_codes(values: Tensor, scales: Tensor, zeros: Tensor, *, bits: int) -> Tensor:
    """round(value / scale + zero), clamped to the grid; all float32, broadcast together; halves round to even.

    Every quantizer rounds by this rule, so that two that should agree do so to the last bit.
    """
    return (values / scales).add_(zeros).round_().clamp_(0, (1 << bits) - 1)


def find_grid(weight: Tensor, *, options: QuantizerOptions, name: str, importance: Tensor | None = None) -> Grid:
    """Choose scale and zero point of every group.

    Args:
        weight: float32 (out, in).
        options: bits, group_size, symmetric, zeros and grid are used.
        name: The layer, for errors.
        importance: float (in,), not negative, same device: how much an input's error counts in the search; None for equal.

    Raises:
        ModelError: The inputs are no whole number of groups.
        NumericsError: A weight is not finite, or too large for a float16 scale.
    """
    out_features, in_features = weight.shape
    check_group(name, in_features, options.group_size)
    grouped = weight.reshape(out_features, -1, options.group_size)
    low, high = _span(grouped, options=options)
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
    return Grid(stored, zeros, options.bits, options.zero_bits, options.group_size)


def _fine(options: QuantizerOptions) -> bool:
    return options.zero_bits > options.bits and not options.symmetric


def _span(grouped: Tensor, *, options: QuantizerOptions) -> tuple[Tensor, Tensor]:
    """Lowest and highest value that the grid of each group should reach, (out, groups); an integer grid has zero between them."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    if _fine(options):
        # one value a group: from zero to it, so that it can be stored exactly
        return torch.where(low < high, low, low.clamp_max(0)), torch.where(low < high, high, high.clamp_min(0))
    low, high = low.clamp_max(0), high.clamp_min(0)
    if options.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def _grid_of(low: Tensor, high: Tensor, *, options: QuantizerOptions) -> tuple[Tensor, Tensor]:
    """Scales (already rounded to float16, as float32) and zeros (float32) of a span."""
    top = (1 << options.bits) - 1
    scales = _storable_scale((high - low) / top)
    if options.symmetric:
        return scales, torch.full_like(scales, 1 << (options.bits - 1))
    if not _fine(options):
        return scales, (-low / scales).round_().clamp_(0, top)
    # a shrunken span keeps its middle; a group of zeros an integer, so that its zeros stay zeros
    middle = torch.where(low < high, top / 2 - (high + low) / (2 * scales), 0.0)
    return scales, _storable_zero(middle, bits=options.bits, zero_bits=options.zero_bits)


def _storable_scale(scales: Tensor) -> Tensor:
    return scales.clamp_min(_SMALLEST_SCALE).to(torch.float16).float()


def _storable_zero(zeros: Tensor, *, bits: int, zero_bits: int) -> Tensor:
    parts = 1 << (zero_bits - bits)
    return (zeros * parts).round_().clamp_(0, (1 << zero_bits) - 1).div_(parts)


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
    fine = _fine(options)
    shifts = torch.tensor((0.0,) if options.symmetric else _FINE_SHIFTS if fine else _INTEGER_SHIFTS, device=low.device)
    # on a GPU all at once, because launches are what a small matrix costs there; on a CPU one by one, to stay in its cache
    together = 1 if low.device.type == "cpu" else len(shifts)
    best_scales, best_zeros = _grid_of(low, high, options=options)
    best = torch.full_like(low, torch.inf)
    empty = (low == 0) & (high == 0)
    for step in range(_SHRINK_STEPS):
        shrink = 1 - step / (_SHRINK_STEPS - 1) * (1 - _SMALLEST_SHRINK)
        half, middle = (high - low) * (shrink / 2), (high + low) / 2
        around = (middle - half, middle + half) if fine else (low * shrink, high * shrink)
        scales, centre = _grid_of(*around, options=options)
        ratios = grouped / scales.unsqueeze(-1)
        for some in shifts.split(together):
            zeros = _storable_zero(centre + some.view(-1, 1, 1), bits=options.bits, zero_bits=options.zero_bits)
            cost = _cost(grouped, ratios, scales, zeros, importance=importance, options=options)
            cost, chosen = cost.masked_fill_(empty & (zeros != zeros.round()), torch.inf).min(dim=0)
            better = cost < best
            best = torch.where(better, cost, best)
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = torch.where(better, zeros.gather(0, chosen.unsqueeze(0))[0], best_zeros)
    return best_scales, best_zeros


def _cost(
    grouped: Tensor, ratios: Tensor, scales: Tensor, zeros: Tensor, *, importance: Tensor | None, options: QuantizerOptions
) -> Tensor:
    """Σ importance · |error|^p of each group when the values over the scale are rounded to the grid."""
    # maximum and minimum are ten times as fast as clamp with tensors for bounds
    zero, top = zeros.unsqueeze(-1), (1 << options.bits) - 1
    clipped = (ratios + zero).round_().clamp_(0, top).sub_(zero)
    error = clipped.mul_(scales.unsqueeze(-1)).sub_(grouped)
    if _fine(options):
        error.square_()
    else:
        # exp2 and log2 are three times as fast as pow; an error of 0 goes through −inf and comes out as 0
        error = error.abs_().log2_().mul_(_POWER).exp2_()
    return (error if importance is None else error.mul_(importance)).sum(-1)
