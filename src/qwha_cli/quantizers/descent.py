"""Making codes and grid better after they were chosen: coordinate descent on the layer's output error.

    minimise  tr(E G Eᵀ)   over codes, scales and zero points,   E = W − s (code − z),   G damped

in rounds of two steps, neither of which can make the error larger: every group's scale and zero point by least squares with all
codes as they are (a 2 × 2 system a group), then one sweep over the columns, each code to the nearest of its best value (COMQ,
Zhang et al. 2024, has the sweep). GPTQ looks forward only: once a column is rounded it is final. The sweeps look at all columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.column_sweep import descent_sweep
from qwha_cli.quantizers.grid import Grid


def polish(
    weight: Tensor, gram: Tensor, codes: Tensor, grid: Grid, *, sweeps: int, block: int, backend: Requested = "auto"
) -> tuple[Tensor, Grid]:
    """Lower the output error of a rounded matrix.

    Args:
        weight: W float32 (out, in).
        gram: G float32 (in, in), its diagonal positive.
        codes: uint8 (out, in).
        grid: Its grid.
        sweeps: Sweeps over all columns, with a refit of the grid between two of them.
        block: Columns a matrix product.
        backend: Of the sweep.

    Returns:
        Codes uint8 (out, in) and their grid; tr(E G Eᵀ) is at most what it was, up to rounding.
    """
    error = (weight - grid.values(codes)).T.contiguous()
    columns = codes.T.contiguous()
    for sweep in range(sweeps):
        if sweep:
            grid = _refit(error, gram, columns, grid)
        _sweep(error, gram, columns, grid, block=block, backend=backend)
    return columns.T.contiguous(), grid


def _sweep(error: Tensor, gram: Tensor, codes: Tensor, grid: Grid, *, block: int, backend: Requested) -> None:
    """One sweep; error and codes (in, out) are updated in place."""
    scales, zeros = grid.by_group()
    for start in range(0, codes.shape[0], block):
        part = slice(start, min(start + block, codes.shape[0]))
        groups = torch.arange(part.start, part.stop, device=codes.device) // grid.group_size
        chosen, changes = descent_sweep(
            gram[part] @ error, gram[part, part], codes[part], scales[groups], zeros[groups], bits=grid.bits, backend=backend
        )
        codes[part] = chosen
        error[part] -= changes


def _refit(error: Tensor, gram: Tensor, codes: Tensor, grid: Grid) -> Grid:
    """Scale and zero of every group by least squares, one group after the other; error (in, out) is updated in place."""
    size = grid.group_size
    scales, zeros = grid.by_group()
    for group in range(scales.shape[0]):
        part = slice(group * size, (group + 1) * size)
        own = gram[part, part]
        levels = codes[part].float() - zeros[group]
        slope = gram[part] @ error
        scale, zero = _least_squares(levels, own, slope, scales[group], zeros[group], grid)
        change = scale * (codes[part].float() - zero) - scales[group] * levels
        # the stored grid is coarser than the solution, so it may be worse than what is there
        gain = 2 * (slope * change).sum(0) - (change * (own @ change)).sum(0)
        better = gain > 0
        scales[group] = torch.where(better, scale, scales[group])
        zeros[group] = torch.where(better, zero, zeros[group])
        error[part] -= torch.where(better, change, 0.0)
    return grid.with_groups(scales, zeros)


def _least_squares(levels: Tensor, own: Tensor, slope: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The best s and z of one group as they can be stored, (out,) each: s' c − o with c = code − z, then z' = z + o / s'."""
    turned = own @ levels
    cc, c1, one = (turned * levels).sum(0), turned.sum(0), own.sum()
    ce, e1 = (slope * levels).sum(0), slope.sum(0)
    determinant = cc * one - c1 * c1
    sound = determinant > 1e-6 * cc * one  # else all levels are alike, and scale and zero mean the same
    safe = torch.where(sound, determinant, 1.0)
    raised = torch.where(sound, (ce * one - e1 * c1) / safe, ce / cc.clamp_min(torch.finfo(cc.dtype).tiny))
    offset = torch.where(sound, (e1 * cc - ce * c1) / safe, 0.0)
    stored = grid.storable_scale(scale + raised)
    return stored, grid.storable_zero(zero - offset / stored)
