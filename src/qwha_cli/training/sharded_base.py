"""A packed base split over the ranks: each keeps its part of every block's codes, and gathers a block for its turn.

FSDP shards parameters, and a packed base has none: its codes and scales are buffers, which FSDP leaves whole on every rank. So
the same is done here, by hand: before a block runs, its parts are gathered into one buffer, and the block before it lets go.
Nothing is computed differently; the result is that of a replicated base to the bit. In the backward pass a block is run again by
activation checkpointing, which gathers it again, so checkpointing is required: without it the backward pass of a block would find
another one's codes gathered. What is trained stays whole on every rank, and so do embeddings, norms and head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qwha_cli.adapters.adapted_linear import AdaptedLinear
from qwha_cli.errors import UsageError
from qwha_cli.models.targets import decoder_blocks
from qwha_cli.quant.linear import QuantizedLinear

# every tensor begins at a multiple of so many bytes, whatever its type
_ALIGNMENT = 16


@dataclass
class _Piece:
    """One tensor of one layer, and where its bytes lie in the block's."""

    layer: QuantizedLinear
    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    size: int
    # on the first rank: the tensor itself on the CPU, for when training is done
    original: Tensor | None

    def put(self, flat: Tensor) -> None:
        """Let the layer see its part of the block's bytes."""
        setattr(self.layer, self.name, flat[self.start : self.start + self.size].view(self.dtype).view(self.shape))

    def take(self, device: torch.device) -> None:
        """Leave an empty tensor: a layer that is used while its codes are away fails, instead of computing with zeros."""
        setattr(self.layer, self.name, torch.empty(0, dtype=self.dtype, device=device))
        self.layer.forget()


@dataclass
class _Block:
    pieces: list[_Piece]
    part: Tensor
    handles: list[RemovableHandle] = field(default_factory=list)


class ShardedBase:
    """The codes of a model's blocks, split over the ranks.

    Args:
        model: A causal language model of transformers whose packed layers are on the CPU; its blocks are moved to the device,
            one at a time.
        rank: This process, of `ranks`.
        ranks: Processes in all.
        device: Where to compute.

    Raises:
        UsageError: Dense weights of the packed layers are to be kept.
    """

    def __init__(self, model: nn.Module, *, rank: int, ranks: int, device: torch.device) -> None:
        self._rank, self._ranks, self._device = rank, ranks, device
        self._present: int | None = None
        self._blocks: list[_Block] = []
        for index, (_, module) in enumerate(decoder_blocks(model)):
            block = self._split(module)
            for child in module.children():
                # not on the block itself: transformers' checkpointing calls its forward past the hooks
                block.handles.append(child.register_forward_pre_hook(functools.partial(self._before, index)))
            self._blocks.append(block)

    def _before(self, index: int, module: nn.Module, args: object) -> None:
        self.gather(index)

    def gather(self, index: int) -> None:
        """Make one block whole; every rank must ask for the same ones in the same order."""
        if self._present == index:
            return
        self._leave()
        part = self._blocks[index].part
        flat = torch.empty(part.numel() * self._ranks, dtype=torch.uint8, device=self._device)
        torch.distributed.all_gather_into_tensor(flat, part)  # pyright: ignore[reportDeprecated]  # its successor is of torch 2.13
        for piece in self._blocks[index].pieces:
            piece.put(flat)
        self._present = index

    def end(self) -> None:
        """Give the layers their codes back, on the CPU and on the first rank only: it is the one that saves."""
        self._leave()
        for block in self._blocks:
            for handle in block.handles:
                handle.remove()
            for piece in block.pieces:
                if piece.original is not None:
                    setattr(piece.layer, piece.name, piece.original)

    def _leave(self) -> None:
        if self._present is not None:
            for piece in self._blocks[self._present].pieces:
                piece.take(self._device)
        self._present = None

    def _split(self, module: nn.Module) -> _Block:
        """Keep this rank's part of a block's bytes, and take the tensors out of it."""
        pieces: list[_Piece] = []
        parts: list[Tensor] = []
        start = 0
        for layer in module.modules():
            if isinstance(layer, AdaptedLinear) and layer.keep == "speed":
                raise UsageError(
                    "a base that is split over the GPUs has no dense weights to keep",
                    where="train.keep",
                    remedy="set train.keep=memory, or do not shard: configs/accelerate/ddp.yaml",
                )
            if not isinstance(layer, QuantizedLinear):
                continue
            for name, tensor in layer.packed().tensors.items():
                size = tensor.numel() * tensor.element_size()
                padded = -(-size // _ALIGNMENT) * _ALIGNMENT
                flat = tensor.new_zeros(padded, dtype=torch.uint8)
                flat[:size] = tensor.contiguous().view(-1).view(torch.uint8)
                parts.append(flat)
                original = tensor if self._rank == 0 else None
                pieces.append(_Piece(layer, name, tensor.shape, tensor.dtype, start, size, original))
                start += padded
        length = -(-start // (self._ranks * _ALIGNMENT)) * _ALIGNMENT
        whole = torch.zeros(length * self._ranks, dtype=torch.uint8)
        if parts:
            whole[:start] = torch.cat(parts).cpu()
        part = whole[self._rank * length : (self._rank + 1) * length].clone().to(self._device)
        for piece in pieces:
            piece.take(self._device)
        module.to(self._device)
        return _Block(pieces, part)
