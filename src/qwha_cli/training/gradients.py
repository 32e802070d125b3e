"""The gradients of all trained parameters in one tensor, which stays where it is.

A recorded pass adds to the memory that it was recorded with, so gradients are set to zero and never dropped. In one tensor they
are also summed over several processes by a single exchange, and forgotten by a single kernel.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# numbers; a parameter's part begins where 16-byte loads can
_ALIGNMENT = 4


class FlatGradients:
    """Gives every parameter a part of one float32 tensor as its gradient.

    Args:
        parameters: All float32 and on one device. Their `grad` is replaced, and must not be set to None afterwards.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        sizes = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in self.parameters]
        self.whole: Tensor = torch.zeros(sum(sizes), dtype=torch.float32, device=self.parameters[0].device)
        start = 0
        for parameter, size in zip(self.parameters, sizes, strict=True):
            parameter.grad = self.whole[start : start + parameter.numel()].view_as(parameter)
            start += size

    def zero(self) -> None:
        """Forget what was accumulated."""
        self.whole.zero_()

    def sum_over_ranks(self) -> None:
        """Add up what the processes have accumulated."""
        torch.distributed.all_reduce(self.whole)

    def release(self) -> None:
        """Take the gradients away from the parameters."""
        for parameter in self.parameters:
            parameter.grad = None
