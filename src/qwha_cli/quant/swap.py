"""Finding and exchanging the linear layers of a model by name."""

from __future__ import annotations

from typing import cast

from torch import nn

from qwha_cli.errors import ModelError
from qwha_cli.quant.linear import QuantizedLinear


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer at a path.

    Args:
        model: Any model.
        name: Full path, such as `model.layers.0.self_attn.q_proj`.

    Returns:
        The nn.Linear; or, in a quantized model, a QuantizedLinear, which has the same sizes and bias but no dense weight.

    Raises:
        ModelError: Nothing is there, or no linear layer.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError("the model has no such layer", where=f"layer {name}", remedy="check the layer's name") from error
    if not isinstance(module, nn.Linear | QuantizedLinear):
        raise ModelError(
            f"a {type(module).__name__} is no linear layer",
            where=f"layer {name}",
            remedy="name a linear layer, or exclude this one",
        )
    return cast(nn.Linear, module)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a path, in the same training mode as the one that was there.

    Args:
        model: Changed in place.
        name: Full path of an existing module.
        module: What to put there.

    Raises:
        ModelError: Nothing is at this path.
    """
    parent, _, child = name.rpartition(".")
    try:
        old = model.get_submodule(name)
        holder = model.get_submodule(parent)
    except AttributeError as error:
        raise ModelError("the model has no such layer", where=f"layer {name}", remedy="check the layer's name") from error
    setattr(holder, child, module.train(old.training))
