"""A model whose weights stay on the disk until a block needs them: a skeleton on the meta device, and the files to fill it from.

Models larger than the memory are walked through block by block (walk.py): `fill` reads a module's tensors from memory-mapped
safetensors onto a device, `drop` lets them go again. A model without files (random weights) is held in memory instead, and both
do nothing; so does whoever uses them not have to know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qwha_cli.errors import ModelError


class Weights(Protocol):
    """Tensors by name, read when asked for."""

    def names(self) -> frozenset[str]:
        """All names."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as it is stored."""
        ...


class FileWeights:
    """The safetensors files of a Hugging Face folder.

    Args:
        folder: Holds model.safetensors, or shards with model.safetensors.index.json.
        aliases: Names that are not in the files to names that are: tied weights.

    Raises:
        ModelError: No such files, or one that cannot be read.
    """

    def __init__(self, folder: Path, *, aliases: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._places = _places(folder)
        self._aliases = dict(aliases or {})

    def names(self) -> frozenset[str]:
        """All names, tied ones included."""
        return frozenset({*self._places, *self._aliases})

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as it is stored.

        Raises:
            ModelError: It is missing, or its file is damaged.
        """
        stored = self._aliases.get(name, name)
        try:
            with safe_open(self._folder / self._places[stored], framework="pt") as file:
                return cast(Tensor, file.get_tensor(stored))
        except (KeyError, OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot read the tensor {stored}: {error}",
                where=str(self._folder),
                remedy="check that the model's files are whole",
            ) from error


class MemoryWeights:
    """The tensors of a model that is held in memory.

    Args:
        model: The model; its tensors are shared.
    """

    def __init__(self, model: nn.Module) -> None:
        # the tensors of now: a walk may put other layers into the model
        self._tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }

    def names(self) -> frozenset[str]:
        """All names."""
        return frozenset(self._tensors)

    def read(self, name: str) -> Tensor:
        """One tensor; the model's own, not to be written to."""
        return self._tensors[name].detach()


def fill(module: nn.Module, prefix: str, weights: Weights, *, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Read what is on the meta device in a module from the weights.

    Args:
        module: Changed in place; tensors that are somewhere already stay.
        prefix: The module's name in the model, "" for the model itself.
        weights: Where to read.
        device: Where to put what was read.
        dtype: Of parameters; None for the stored one. Buffers keep theirs: codes and scales are part of a format.

    Raises:
        ModelError: A tensor is missing or has another shape.
    """
    for name, owner, key, tensor in _own_tensors(module):
        if not tensor.is_meta:
            continue
        full = f"{prefix}.{name}" if prefix else name
        found = weights.read(full)
        if found.shape != tensor.shape:
            raise ModelError(
                f"the tensor {full} has shape {tuple(found.shape)}, the model's configuration asks for {tuple(tensor.shape)}",
                remedy="check that config.json belongs to these files",
            )
        if isinstance(tensor, nn.Parameter):
            moved = found.to(device=device, dtype=dtype if found.is_floating_point() else None)
            setattr(owner, key, nn.Parameter(moved, requires_grad=False))
        else:
            setattr(owner, key, found.to(device))


def drop(module: nn.Module) -> None:
    """Put a module's parameters and persistent buffers on the meta device; what no file holds stays, on the CPU."""
    stored = set(module.state_dict())
    for name, owner, key, tensor in _own_tensors(module):
        if isinstance(tensor, nn.Parameter):
            setattr(owner, key, nn.Parameter(tensor.detach().to("meta"), requires_grad=False))
        else:
            setattr(owner, key, tensor.to("meta" if name in stored else "cpu"))


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, nn.Module, str, Tensor]]:
    """(name, owner, the owner's key, tensor) of every parameter and buffer."""
    for path, owner in module.named_modules():
        for key, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            yield (f"{path}.{key}" if path else key), owner, key, tensor


def _places(folder: Path) -> dict[str, str]:
    """Tensor name to file name."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            return cast("dict[str, str]", json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        places: dict[str, str] = {}
        with ExitStack() as stack:
            for path in sorted(folder.glob("*.safetensors")):
                file = stack.enter_context(safe_open(path, framework="pt"))
                places |= dict.fromkeys(file.keys(), path.name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"cannot read the model's files: {error}", where=str(folder), remedy="check that they are whole, or download it again"
        ) from error
    if not places:
        raise ModelError("no *.safetensors in this folder", where=str(folder), remedy="convert the weights to safetensors")
    return places
