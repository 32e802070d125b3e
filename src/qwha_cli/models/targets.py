"""Which linear layers of a model are compressed and adapted: those inside its decoder blocks, never the vocabulary head.

Blocks are found by what they are, not by an architecture's name: the longest list of modules of one class inside the model's
decoder. So a new architecture of transformers works as long as its projections are nn.Linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from qwha_cli import catalog
from qwha_cli.errors import ModelError

SUPPORTED = "Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, Gemma 3, Phi, Phi-3 and others whose projections are torch.nn.Linear"


@dataclass(frozen=True)
class Target:
    """A linear layer inside a decoder block.

    Attributes:
        name: Its full path in the model, "model.layers.3.mlp.down_proj".
        block: The number of its block, from 0.
        projection: What it is called within every block: "down_proj", or its path in the block where that is ambiguous.
    """

    name: str
    block: int
    projection: str


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks in order, each with its path in the model ("model.layers.0").

    Args:
        model: A decoder-only language model, plain, quantized or wrapped by peft.

    Raises:
        ModelError: No list of blocks of one class.
    """
    root = _decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is root)
    outer: list[str] = []
    best: list[tuple[str, nn.Module]] = []
    for name, modules in root.named_modules():
        # lists inside a block (experts) are not the blocks; named_modules comes to the outer list first
        if not isinstance(modules, nn.ModuleList) or any(name.startswith(f"{list_name}.") for list_name in outer):
            continue
        outer.append(name)
        if len({type(module) for module in modules}) == 1 and len(modules) > len(best):
            path = f"{prefix}.{name}" if prefix else name
            best = [(f"{path}.{index}", module) for index, module in enumerate(modules)]
    if not best:
        raise ModelError(
            f"{type(model).__name__} has no list of equal decoder blocks", remedy=f"use a supported model: {SUPPORTED}"
        )
    return best


def find_targets(
    model: nn.Module,
    *,
    targets: Sequence[str] = "all-linear",
    exclude: Sequence[str] = (),
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> list[Target]:
    """The linear layers to work on, in the order of the model.

    A name selects every layer whose path contains it as whole components: "down_proj", "self_attn", "mlp.up_proj", "layers.0".

    Args:
        model: A decoder-only language model.
        targets: Names, or "all-linear" for every linear layer inside the blocks.
        exclude: Names to leave out.
        kinds: What counts as a linear layer; add the quantized or adapted layer classes to find those of a compressed model.

    Raises:
        ModelError: The architecture has no such layers, a name fits none (the nearest is named), or none is left.
    """
    found = list(_linears(model, kinds))
    if not found:
        raise ModelError(
            f"the decoder blocks of {type(model).__name__} have no {' or '.join(kind.__name__ for kind in kinds)}",
            remedy=f"use a supported model: {SUPPORTED}",
        )
    names = [targets] if isinstance(targets, str) else list(targets)
    for pattern in [*names, *exclude]:
        if pattern != "all-linear" and not any(_fits(pattern, target.name) for target in found):
            raise _unknown(pattern, found)
    chosen = [
        target
        for target in found
        if any(pattern == "all-linear" or _fits(pattern, target.name) for pattern in names)
        and not any(_fits(pattern, target.name) for pattern in exclude)
    ]
    if not chosen:
        raise ModelError(
            "no layer is left to adapt", where="adapter.exclude", remedy="shorten adapter.exclude, or widen adapter.targets"
        )
    return chosen


def _decoder(model: nn.Module) -> nn.Module:
    """The text decoder where the model can name it: a model that also sees pictures has block lists of its own for them."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) and any(module is decoder for module in model.modules()) else model


def _linears(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterable[Target]:
    for index, (prefix, block) in enumerate(decoder_blocks(model)):
        paths: list[str] = []
        for path, module in block.named_modules():
            # an adapted layer holds its base layer and more: the outermost is the target
            if path and isinstance(module, kinds) and not any(path.startswith(f"{outer}.") for outer in paths):
                paths.append(path)
        last = [path.rpartition(".")[2] for path in paths]
        for path, short in zip(paths, last, strict=True):
            yield Target(f"{prefix}.{path}", index, short if last.count(short) == 1 else path)


def _fits(pattern: str, name: str) -> bool:
    return f".{pattern}." in f".{name}."


def _unknown(pattern: str, found: Sequence[Target]) -> ModelError:
    projections = sorted({target.projection for target in found})
    near = catalog.nearest(pattern.rpartition(".")[2], projections)
    hint = f"did you mean {near!r}? " if near else ""
    return ModelError(
        f"no linear layer of this name; {hint}this model has: {', '.join(projections)}",
        where=pattern,
        remedy="correct adapter.targets or adapter.exclude",
    )
