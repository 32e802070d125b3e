"""Block-wise reconstruction: train a few numbers of one decoder block until its output is the 16-bit model's again.

    minimise  Σ ‖ f(h; θ) − t ‖²  /  Σ ‖ t ‖²

h are the block's inputs in the compressed model, t the outputs of the same block of the 16-bit model, which ran on inputs of its
own: what earlier blocks lost is made up for as far as this block can. Errors of the layers inside a block make up for each
other too, which no layer's own error sees (BRECQ, Li et al. 2021; EfficientQAT, Chen et al. 2024).
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


def block_error(block: Block) -> float:
    """The squared error of a block's output against the 16-bit model's, as a share of theirs."""
    with torch.no_grad():
        total = sum(_squared_error(block, batch).item() for batch in range(len(block.targets)))
    return total / _scale(block)


def reconstruct(block: Block, parameters: Iterable[tuple[nn.Parameter, float]], *, epochs: int, seed: int) -> None:
    """Train parameters of layers that the caller has put into a block.

    Args:
        block: In its turn, of a walk with an original.
        parameters: Each with its learning rate; Adam, a cosine down to zero.
        epochs: Passes over all calibration batches.
        seed: Of their order.
    """
    chosen = list(parameters)
    block.module.requires_grad_(False)
    for parameter, _ in chosen:
        parameter.requires_grad_(True)
    groups = [{"params": [parameter], "peak": rate} for parameter, rate in chosen]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS)
    batches, scale = len(block.targets), _scale(block) / len(block.targets)
    order = torch.Generator().manual_seed(seed)
    step, total = 0, epochs * batches
    for _ in range(epochs):
        for batch in torch.randperm(batches, generator=order).tolist():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total=total, peak=group["peak"], schedule="cosine", warmup=_WARM_UP)
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                (_squared_error(block, batch) / scale).backward()
            optimizer.step()
            step += 1


def _squared_error(block: Block, batch: int) -> Tensor:
    target = block.targets[batch].to(block.device)
    return (block.forward(batch).float() - target.float()).square().sum()


def _scale(block: Block) -> float:
    """Σ ‖ t ‖² over all batches."""
    return sum(float(target.float().square().sum(dtype=torch.float64)) for target in block.targets)
