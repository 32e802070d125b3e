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


class Reconstruction:
    """The reconstruction of one block.

    Args:
        block: In its turn, of a walk with an original.
        token_weights: w (samples, length); None for ones.
    """

    def __init__(self, block: Block, token_weights: Tensor | None = None) -> None:
        self._block = block
        sizes = [len(target) for target in block.targets]
        self._weights = None if token_weights is None else token_weights.split(sizes)
        energies = (self._weighted(y.float().square().sum(-1), batch) for batch, y in enumerate(block.targets))
        self._energy = sum(float(part.sum(dtype=torch.float64)) for part in energies)

    def error(self) -> float:
        """The weighted squared error of the block's outputs as it is now, as a share of the 16-bit model's."""
        with torch.no_grad():
            return sum(self._squared_error(batch).item() for batch in range(len(self._block.targets))) / self._energy

    def train(self, parameters: Iterable[tuple[nn.Parameter, float]], *, epochs: int, seed: int) -> None:
        """Train parameters of layers that the caller has put into the block.

        Args:
            parameters: Each with its learning rate; Adam, a cosine down to zero. Without any, nothing is done.
            epochs: Passes over all calibration batches.
            seed: Of their order.
        """
        chosen = list(parameters)
        if not chosen:
            return
        self._block.module.requires_grad_(False)
        for parameter, _ in chosen:
            parameter.requires_grad_(True)
        groups = [{"params": [parameter], "peak": rate} for parameter, rate in chosen]
        optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS)
        batches = len(self._block.targets)
        order = torch.Generator().manual_seed(seed)
        step, total = 0, epochs * batches
        for _ in range(epochs):
            for batch in torch.randperm(batches, generator=order).tolist():
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total=total, peak=group["peak"], schedule="cosine", warmup=_WARM_UP)
                optimizer.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    (self._squared_error(batch) / (self._energy / batches)).backward()
                optimizer.step()
                step += 1

    def _squared_error(self, batch: int) -> Tensor:
        target = self._block.targets[batch].to(self._block.device)
        return self._weighted((self._block.forward(batch).float() - target.float()).square().sum(-1), batch).sum()

    def _weighted(self, values: Tensor, batch: int) -> Tensor:
        """Values (samples, length) of one batch times their tokens' weights."""
        return values if self._weights is None else values * self._weights[batch].to(values)
