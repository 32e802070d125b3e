"""What each decoder block is called with: the first one's hidden states, and for all of them everything else.

Rotary tables, masks, sliding windows differ by architecture and by layer. They are not computed here but recorded: the model's
own decoder runs once with recorders in place of its blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qwha_cli.errors import ModelError
from qwha_cli.models.targets import SUPPORTED
from qwha_cli.models.weights import Weights, drop, fill
from qwha_cli.quant.embedding import QuantizedEmbedding


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with, but for its hidden states."""

    args: tuple[object, ...]
    kwargs: dict[str, object]


class _AllRecorded(Exception):
    """Every block has been called: no error, it ends a forward pass whose rest would be wasted."""


class _Recorder(nn.Module):
    """Stands in a block's place and notes what it is called with; hands the same hidden states to the next."""

    def __init__(self, block: nn.Module, seen: list[tuple[Tensor, BlockCall]], *, last: bool) -> None:
        super().__init__()
        # hidden in a tuple: as a submodule it would be counted, moved and hooked
        self._block = (block,)
        self._seen = seen
        self._last = last

    def __getattr__(self, name: str) -> object:  # pyright: ignore[reportIncompatibleMethodOverride] - nn.Module returns Any
        # decoders read attributes of their blocks, such as the kind of attention
        return getattr(self._block[0], name) if not name.startswith("_") else super().__getattr__(name)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Note the call; the hidden states are the first argument or named."""
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        hidden = cast("Tensor", args[0] if args else kwargs["hidden_states"])
        self._seen.append((hidden, BlockCall(args[1:], named)))
        if self._last:
            raise _AllRecorded
        return hidden


def record(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    tokens: Tensor,
    *,
    batch_size: int,
    dtype: torch.dtype,
    weights: Weights | None,
) -> tuple[list[Tensor], dict[int, list[BlockCall]]]:
    """Run a model's decoder up to its blocks and note what they are called with.

    Args:
        model: The model; as it was when this returns.
        blocks: Its decoder blocks with their paths.
        tokens: int64 (samples, length).
        batch_size: Samples a pass.
        dtype: Of the hidden states returned.
        weights: Where a skeleton's weights are read; None for a model in memory.

    Returns:
        The first block's inputs for every batch, and for every batch size what each block is called with.

    Raises:
        ModelError: The decoder does not call each of its blocks once.
    """
    path = blocks[0][0].rpartition(".")[0]
    decoder = path.rpartition(".")[0]
    owner, modules = model.get_submodule(decoder), cast("nn.ModuleList", model.get_submodule(path))
    hidden: list[Tensor] = []
    calls: dict[int, list[BlockCall]] = {}
    seen: list[tuple[Tensor, BlockCall]] = []
    before: torch.dtype | None = None
    try:
        for index, (_, block) in enumerate(blocks):
            modules[index] = _Recorder(block, seen, last=index + 1 == len(blocks))
        if weights is not None:  # embeddings and what else lies before the blocks, which are not submodules now
            fill(owner, decoder, weights, device="cpu", dtype=None)
        embed = cast("Callable[[], nn.Module]", getattr(owner, "get_input_embeddings"))()  # noqa: B009 - not known to nn.Module
        if isinstance(embed, QuantizedEmbedding):
            # its rows are made anew: in float32 they need not have been rounded before
            before = embed.like.dtype
            embed.to(dtype)
        home = next(itertools.chain(embed.parameters(), embed.buffers())).device
        for batch in tokens.split(batch_size):
            seen.clear()
            with torch.no_grad():
                inputs = embed(batch.to(home))
                # rotary tables take the dtype of the embeddings: never coarser than the weights or the walk
                inputs = inputs.float() if dtype == torch.float32 else inputs
                with suppress(_AllRecorded):
                    owner(inputs_embeds=inputs, use_cache=False)
            if len(seen) != len(blocks):
                raise ModelError(
                    f"{type(owner).__name__} called {len(seen)} of its {len(blocks)} blocks once",
                    remedy=f"use a supported model: {SUPPORTED}",
                )
            hidden.append(seen[0][0].to(device="cpu", dtype=dtype))
            calls.setdefault(len(batch), [call for _, call in seen])
        if weights is not None:
            drop(owner)
    finally:
        if before is not None:
            cast("Callable[[], nn.Module]", getattr(owner, "get_input_embeddings"))().to(before)  # noqa: B009
        for index, (_, block) in enumerate(blocks):
            modules[index] = block
    return hidden, calls
