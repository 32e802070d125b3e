"""Block-wise reconstruction: train a few numbers of one decoder block until its output is the 16-bit model's again.

    minimise  Σ_t w_t ‖ f(h_t; θ) − y_t ‖²  /  Σ_t w_t ‖ y_t ‖²

h are the block's inputs in the compressed model, y the outputs of the same block of the 16-bit model, which ran on inputs of its
own: what earlier blocks lost is made up for as far as this block can. w is what the loss minds (models/sensitivity.py), or one.
Errors of layers inside a block make up for each other too, which no layer's own error sees (BRECQ, Li et al. 2021; EfficientQAT,
Chen et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qwha_cli.models.walk import Block
from qwha_cli.training.optim import learning_rate

# of all steps
_WARM_UP = 0.05
_BETAS = (0.9, 0.95)


def block_error(block: Block, token_weights: Tensor | None = None) -> float:
    """The squared error of a block's outputs against the 16-bit model's, as a share of theirs.

    Args:
        block: In its turn, of a walk with an original.
        token_weights: w (samples, length); None for ones.
    """
    with torch.no_grad():
        total = sum(_squared_error(block, batch, token_weights).item() for batch in range(len(block.targets)))
    return total / _scale(block, token_weights)


def reconstruct(
    block: Block, parameters: Iterable[tuple[nn.Parameter, float]], *, epochs: int, seed: int, token_weights: Tensor | None = None
) -> None:
    """Train parameters of layers that the caller has put into a block.

    Args:
        block: In its turn, of a walk with an original.
        parameters: Each with its learning rate; Adam, a cosine down to zero. Without any, nothing is done.
        epochs: Passes over all calibration batches.
        seed: Of their order.
        token_weights: w (samples, length); None for ones.
    """
    chosen = list(parameters)
    if not chosen:
        return
    block.module.requires_grad_(False)
    for parameter, _ in chosen:
        parameter.requires_grad_(True)
    groups = [{"params": [parameter], "peak": rate} for parameter, rate in chosen]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS)
    batches, scale = len(block.targets), _scale(block, token_weights) / len(block.targets)
    order = torch.Generator().manual_seed(seed)
    step, total = 0, epochs * batches
    for _ in range(epochs):
        for batch in torch.randperm(batches, generator=order).tolist():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total=total, peak=group["peak"], schedule="cosine", warmup=_WARM_UP)
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                (_squared_error(block, batch, token_weights) / scale).backward()
            optimizer.step()
            step += 1


def _squared_error(block: Block, batch: int, token_weights: Tensor | None) -> Tensor:
    target = block.targets[batch].to(block.device)
    return _weighted((block.forward(batch).float() - target.float()).square().sum(-1), block, batch, token_weights).sum()


def _scale(block: Block, token_weights: Tensor | None) -> float:
    """Σ w ‖ y ‖² over all batches."""
    squares = (_weighted(y.float().square().sum(-1), block, batch, token_weights) for batch, y in enumerate(block.targets))
    return sum(float(part.sum(dtype=torch.float64)) for part in squares)


def _weighted(values: Tensor, block: Block, batch: int, token_weights: Tensor | None) -> Tensor:
    """Values (samples, length) of one batch times their tokens' weights."""
    if token_weights is None:
        return values
    first = sum(len(states) for states in block.targets[:batch])
    return values * token_weights[first : first + len(values)].to(values)
