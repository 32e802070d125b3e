"""GPTQ: round column by column, and let the columns still to come make good the error of those already rounded.

min over codes of tr((W − Q) G (W − Q)ᵀ), G = XᵀX, by the greedy solution of Frantar et al., "GPTQ" (2022), §3: with U upper
triangular and G⁻¹ = Uᵀ U, column j is rounded, its error is e = (w_j − q_j) / U_jj, and the later columns become W_k − e U_jk.
Columns are taken in their order (no act-order) and in blocks: within a block only the block is updated, all later columns once at
its end. The grids are found beforehand from the original weights (static groups), so they are the ones that `rtn` uses, and with
G = I the codes are rtn's to the last bit. Same input, same bits: no sampling, fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.errors import NumericsError
from qwha_cli.quant.packed import PackedWeight, QuantizerOptions
from qwha_cli.quantizers.grid import Grid, find_grid, gram_importance, nearest_codes
from qwha_cli.quantizers.magr import smooth


def quantize(weight: Tensor, gram: Tensor | None, *, options: QuantizerOptions, name: str) -> PackedWeight:
    """Quantize a matrix with error feedback.

    Args:
        weight: float32 (out, in), in the basis to be quantized; not written into.
        gram: G = XᵀX float32 (in, in) of the inputs in the same basis, same device; None for the identity.
        options: Bits, group size, grid, damping, magr, block.
        name: The layer, for errors.

    Returns:
        The codes, on the weight's device.

    Raises:
        ModelError: The inputs are no whole number of groups.
        NumericsError: A weight or the Gram matrix is not finite, the damped Gram matrix cannot be factorised, or MagR diverged.
    """
    if gram is not None and options.magr is not None:
        weight = smooth(weight, gram, alpha=options.magr, group_size=options.group_size, name=name)
    grid = find_grid(weight, options=options, name=name, importance=gram_importance(gram))
    if gram is None:
        codes = grid.codes(weight)
    else:
        factor = inverse_factor(gram, damping=options.damping, name=name).to(weight.dtype)
        codes = _round_with_feedback(weight, factor, grid, group_size=options.group_size, block=options.block)
    return PackedWeight.from_codes(codes, grid.scales, grid.zeros, format=options.format)


def inverse_factor(gram: Tensor, *, damping: float, name: str) -> Tensor:
    """The upper triangular U with (G + damping · mean(diag G) · I)⁻¹ = Uᵀ U.

    Inputs that were always zero get the mean as their diagonal: nothing connects them to others, so they are rounded plainly.

    Args:
        gram: G, floating (in, in), symmetric.
        damping: Fraction of the mean of the diagonal.
        name: The layer, for errors.

    Returns:
        float64 (in, in).

    Raises:
        NumericsError: G is not finite, or the factorisation fails.
    """
    # float64: with a small damping float32 is not enough for an ill-conditioned G, and this is not what takes the time
    damped = gram.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:
        return torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    # With P the reversal and P G P = L Lᵀ, U = P L⁻¹ P: one factorisation and one triangular inverse, and never G⁻¹ itself
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info) != 0 or not bool(torch.isfinite(lower).all()):
        raise NumericsError(
            f"the Gram matrix of {gram.shape[0]} inputs with damping {damping:g} has no Cholesky factorisation",
            where=f"layer {name}",
            remedy="raise quantize.damping, or take more calibration text with quantize.calibration.samples",
        )
    identity = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


def _round_with_feedback(weight: Tensor, factor: Tensor, grid: Grid, *, group_size: int, block: int) -> Tensor:
    """The codes, uint8 (out, in). Works on the transpose, where a column of W is contiguous."""
    rest = weight.T.contiguous()  # a copy: T of a contiguous matrix is not contiguous
    if rest.data_ptr() == weight.data_ptr():
        rest = rest.clone()
    scales, zeros = grid.scales.T.float(), grid.zeros.T.float()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    for start in range(0, rest.shape[0], block):
        stop = min(start + block, rest.shape[0])
        errors = torch.empty_like(rest[start:stop])
        for j in range(start, stop):
            scale, zero = scales[j // group_size], zeros[j // group_size]
            code = nearest_codes(rest[j], scale, zero, bits=grid.bits)
            codes[j] = code.to(torch.uint8)
            error = (rest[j] - scale * (code - zero)) / factor[j, j]
            rest[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()
