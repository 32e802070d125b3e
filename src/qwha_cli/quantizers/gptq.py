"""GPTQ: round column by column, and let the columns still to come make good the error of those already rounded.

min over codes of tr((W − Q) G (W − Q)ᵀ), G = XᵀX, by the greedy solution of Frantar et al., "GPTQ" (2022), §3: with U upper
triangular and G⁻¹ = Uᵀ U, column j is rounded, its error is e = (w_j − q_j) / U_jj, and the later columns become W_k − e U_jk.
Columns are taken in their order (no act-order) and in blocks: within a block only the block is updated (kernels/column_sweep.py),
all later columns once at its end. The grids are found beforehand from the original weights (static groups), so they are the ones
that `rtn` uses, and with G = I and without sweeps the codes are rtn's to the last bit. Sweeps (descent.py) then improve codes and
grid. Same input, same bits: no sampling, fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.column_sweep import feedback_sweep
from qwha_cli.quant.gram import Gram
from qwha_cli.quant.packed import PackedWeight, QuantizerOptions
from qwha_cli.quantizers.descent import polish
from qwha_cli.quantizers.grid import Grid, find_grid
from qwha_cli.quantizers.magr import smooth


def quantize(weight: Tensor, gram: Gram | None, *, options: QuantizerOptions, name: str) -> PackedWeight:
    """Quantize a matrix with error feedback.

    Args:
        weight: float32 (out, in), in the basis to be quantized; not written into.
        gram: G = XᵀX of the inputs in the same basis, same device; None for the identity.
        options: Bits, group size, grid, damping, magr, sweeps, block.
        name: The layer, for errors.

    Returns:
        The codes, on the weight's device.

    Raises:
        ModelError: The inputs are no whole number of groups.
        NumericsError: A weight or the Gram matrix is not finite, the damped Gram matrix cannot be factorised, or MagR diverged.
    """
    smoothed = weight
    if gram is not None and options.magr is not None:
        smoothed = smooth(weight, gram.matrix, alpha=options.magr, group_size=options.group_size, name=name)
    grid = find_grid(smoothed, options=options, name=name, importance=gram.importance() if gram is not None else None)
    if gram is None:
        return PackedWeight.from_codes(grid.codes(smoothed), grid.scales, grid.zeros, format=options.format)
    factor = gram.inverse_factor(options.damping, name=name)
    codes = _round_with_feedback(smoothed, factor, grid, block=options.block, backend=options.backend)
    if options.sweeps:
        damped = gram.damped(options.damping)
        codes, grid = polish(weight, damped, codes, grid, sweeps=options.sweeps, block=options.block, backend=options.backend)
    return PackedWeight.from_codes(codes, grid.scales, grid.zeros, format=options.format)


def _round_with_feedback(weight: Tensor, factor: Tensor, grid: Grid, *, block: int, backend: Requested) -> Tensor:
    """The codes, uint8 (out, in). Works on the transpose, where a column of W is contiguous."""
    rest = weight.T.clone(memory_format=torch.contiguous_format)
    scales, zeros = grid.by_group()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    for start in range(0, rest.shape[0], block):
        part = slice(start, min(start + block, rest.shape[0]))
        groups = torch.arange(part.start, part.stop, device=rest.device) // grid.group_size
        codes[part], errors = feedback_sweep(
            rest[part], factor[part, part], scales[groups], zeros[groups], bits=grid.bits, backend=backend
        )
        rest[part.stop :].addmm_(factor[part, part.stop :].T, errors, alpha=-1)
    return codes.T.contiguous()
