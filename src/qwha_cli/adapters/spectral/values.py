"""The values of the sparse adapters on a layer, by adapter name: float32 while they can be trained, else as their file has them.

Kernels make float32 of what they read, so a file's bfloat16 numbers give the same result to the bit in half the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Values(nn.ParameterDict):
    """Values (nnz,) by adapter name. What a file holds is never rounded, whatever the place that was made for it."""

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] - torch calls it by place
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        for name, value in list(self.items()):
            found = state_dict.get(f"{prefix}{name}")
            if found is not None and found.dtype.itemsize > value.dtype.itemsize:
                self[name] = nn.Parameter(value.detach().to(found.dtype), requires_grad=value.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args)  # pyright: ignore[reportArgumentType]


def widen_trained(values: nn.ParameterDict) -> None:
    """Make float32 of whatever requires a gradient: bfloat16 does not hold what a step adds."""
    for name, value in list(values.items()):
        if value.requires_grad and value.dtype != torch.float32:
            values[name] = nn.Parameter(value.detach().float())


def frozen(value: Tensor) -> nn.Parameter:
    """Values that stay as they are, in bfloat16 if that holds them exactly."""
    half = value.detach().to(torch.bfloat16)
    exact = torch.equal(half.float(), value.detach().float())
    return nn.Parameter(half if exact else value.detach(), requires_grad=False)


def moved(value: Tensor, device: torch.device) -> nn.Parameter:
    """Values on a device: float32 if they are trained, also where peft put a file's own bfloat16 tensor in their place."""
    there = value.detach().to(device, torch.float32 if value.requires_grad else value.dtype)
    return nn.Parameter(there, requires_grad=value.requires_grad)
