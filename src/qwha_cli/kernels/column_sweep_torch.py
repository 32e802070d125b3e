"""The column sweep in torch operations: one Python step a column. The reference, right on every device; see column_sweep.py."""

from __future__ import annotations

import torch
from torch import Tensor


def feedback_sweep(rest: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """As `column_sweep.feedback_sweep`."""
    rest = rest.clone(memory_format=torch.contiguous_format)
    columns, top = rest.shape[0], (1 << bits) - 1
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    errors = torch.empty_like(rest)
    for j in range(columns):
        code = (rest[j] / scales[j]).add_(zeros[j]).round_().clamp_(0, top)
        codes[j] = code.to(torch.uint8)
        torch.div(rest[j] - scales[j] * code.sub_(zeros[j]), factor[j, j], out=errors[j])
        rest[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return codes, errors


def descent_sweep(
    slope: Tensor, gram: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int
) -> tuple[Tensor, Tensor]:
    """As `column_sweep.descent_sweep`."""
    slope = slope.clone(memory_format=torch.contiguous_format)
    columns, top = slope.shape[0], (1 << bits) - 1
    chosen = torch.empty_like(codes)
    changes = torch.empty_like(slope)
    for j in range(columns):
        now = codes[j].float().sub_(zeros[j]).mul_(scales[j])
        code = ((slope[j] / gram[j, j]).add_(now).div_(scales[j])).add_(zeros[j]).round_().clamp_(0, top)
        chosen[j] = code.to(torch.uint8)
        torch.sub(code.sub_(zeros[j]).mul_(scales[j]), now, out=changes[j])
        slope.addr_(gram[j], changes[j], alpha=-1)
    return chosen, changes
