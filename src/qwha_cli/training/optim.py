"""AdamW over the trained values, the learning rate as a pure function of the step, and the optimizer's state as plain tensors.

`adamw8bit` is bitsandbytes' AdamW: both moments in blocks of 8-bit numbers, a quarter of the memory of their float32. The values
themselves stay float32.

No scheduler object: the rate of step s follows from s and the settings alone, so nothing of it needs saving. The state is
written and read under the parameters' names, not their order, so that a checkpoint of another model cannot be taken in silently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.adapters.spectral.values import widen_trained
from qwha_cli.errors import ArtifactError

OptimizerName = Literal["adamw", "adamw8bit"]
Schedule = Literal["cosine", "linear", "constant"]
VALUES = "values"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter with `requires_grad`, by name, in the model's order; a sparse adapter's values become float32."""
    for module in model.modules():
        if isinstance(module, SpectralLinear):
            # loaded to stay as they are they may be bfloat16
            widen_trained(module.qwha_values)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], *, lr: float, weight_decay: float, name: OptimizerName = "adamw"
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) over `parameters`; the fused kernel on CUDA, where it saves one launch a tensor."""
    tensors = list(parameters.values())
    if name == "adamw8bit":
        # seconds to import, and nothing else of training needs it
        from bitsandbytes.optim import AdamW8bit

        return cast(torch.optim.Optimizer, AdamW8bit(tensors, lr=lr, weight_decay=weight_decay))
    fused = all(tensor.device.type == "cuda" for tensor in tensors)
    return torch.optim.AdamW(tensors, lr=lr, weight_decay=weight_decay, fused=fused)


def warmup_steps(warmup: float, *, total: int) -> int:
    """The number of warm-up steps: `warmup` below 1 is a share of the total (rounded up), else a count."""
    return min(total, math.ceil(warmup * total) if warmup < 1 else round(warmup))


def learning_rate(step: int, *, total: int, peak: float, schedule: Schedule, warmup: float) -> float:
    """The rate used by the step of index `step` (from 0).

    Rises linearly to `peak` over the warm-up (reaching it with its last step), then falls along half a cosine or a line towards
    zero, which the step after the last would use; `constant` stays.
    """
    rising = warmup_steps(warmup, total=total)
    if step < rising:
        return peak * (step + 1) / rising
    share = (step - rising) / max(1, total - rising)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * share))
    if schedule == "linear":
        return peak * (1.0 - share)
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def training_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Values and optimizer state as `KIND/NAME` -> tensor on the CPU; KIND is `values` or what the optimizer calls its own."""
    tensors = {f"{VALUES}/{name}": parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            # bitsandbytes counts its steps in a plain number; tables that parameters share are written for each
            tensors[f"{kind}/{name}"] = torch.as_tensor(tensor).detach().cpu().contiguous().clone()
    return tensors


def restore_tensors(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], *, optimizer: torch.optim.Optimizer, where: str
) -> None:
    """Put back what `training_tensors` took.

    Args:
        tensors: The content of a checkpoint.
        parameters: The trained parameters of the model as it is now; overwritten.
        optimizer: Over the same parameters; its state is replaced.
        where: The checkpoint, for the error.

    Raises:
        ArtifactError: Names or shapes differ from the model's.
    """
    shapes = {name.removeprefix(f"{VALUES}/"): tensor.shape for name, tensor in tensors.items() if name.startswith(f"{VALUES}/")}
    wanted = {name: parameter.shape for name, parameter in parameters.items()}
    if shapes != wanted:
        odd = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        raise ArtifactError(
            f"the checkpoint's trained tensors are not this model's: {len(odd)} differ in name or shape, first {odd[0]}",
            where=where,
            remedy="delete the checkpoint folder to train from the start",
        )
    plain_steps = not isinstance(optimizer, torch.optim.AdamW)
    state: dict[int, dict[str, Tensor | int]] = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        with torch.no_grad():
            parameter.copy_(tensors[f"{VALUES}/{name}"])
        of_name = {key.partition("/")[0]: tensor for key, tensor in tensors.items() if key.partition("/")[2] == name}
        state[index] = {
            kind: int(tensor) if kind == "step" and plain_steps else tensor for kind, tensor in of_name.items() if kind != VALUES
        }
    # load_state_dict moves the moments to each parameter's device; only `state` is ours, the groups stay as built.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
