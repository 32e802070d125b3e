"""Running calibration tokens through a model one decoder block at a time.

Only the block whose turn it is lies on the compute device. The hidden states of all samples wait there too where they take little
of its free memory, else on the CPU: moving them there and back costs more time than many a block. The caller may change the
block during its turn (quantize its layers, add adapters); when the iteration goes on, the changed block makes the inputs of the
next one, so that every block is calibrated on what it will really see.

A model may be a skeleton whose weights are read from files (weights.py): then each block is filled for its turn and dropped after
it, and what the caller puts into it is the caller's to keep. Beside the walk the 16-bit model can run on inputs of its own: its
outputs are what a changed block should reproduce.

What a block is called with besides hidden states is recorded beforehand, see record.py.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from qwha_cli.errors import ModelError
from qwha_cli.models.gram import GramAccumulator
from qwha_cli.models.record import BlockCall, record
from qwha_cli.models.targets import decoder_blocks
from qwha_cli.models.weights import Weights, drop, fill
from qwha_cli.quant.gram import Gram

HALF = (torch.bfloat16, torch.float16)


@dataclass
class _Walk:
    """What the blocks of one walk share: the hidden states between them, and how to call a block."""

    device: torch.device
    dtype: torch.dtype
    # where hidden states wait
    home: torch.device
    hidden: list[Tensor]
    # by number of samples in a batch, since the last may be smaller: one call a block
    calls: dict[int, list[BlockCall]]
    # the 16-bit model's outputs of the block whose turn it is
    targets: list[Tensor] | None = None
    # where inputs were already replaced by outputs of the block `done - 1`
    done: int = 0

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=self.dtype) if self.dtype in HALF else nullcontext()

    def call(self, module: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """What the block `index` makes of one batch of hidden states, on the compute device."""
        call = self.calls[hidden.shape[0]][index]
        with self.autocast():
            moved: dict[int, object] = {}
            args = [_to(value, self.device, moved) for value in call.args]
            kwargs = {name: _to(value, self.device, moved) for name, value in call.kwargs.items()}
            return _first(module(hidden.to(self.device), *args, **kwargs))

    def through(self, module: nn.Module, index: int, states: list[Tensor]) -> None:
        """Replace batches of hidden states by what a block makes of them."""
        for batch, hidden in enumerate(states):
            with torch.no_grad():
                states[batch] = self.call(module, index, hidden).to(device=self.home, dtype=self.dtype)


@dataclass(frozen=True)
class Original:
    """The 16-bit model that runs beside a walk.

    Attributes:
        model: The model walked through itself (each block runs before the caller sees it), or one of the same architecture.
        weights: Where a skeleton's weights are read; None for a model in memory.
    """

    model: nn.Module
    weights: Weights | None = None


@dataclass
class Block:
    """A decoder block during its turn, its module on the compute device.

    Attributes:
        index: Its number, from 0.
        name: Its path in the model, "model.layers.3".
        module: The block; layers in it may be replaced.
        last: Whether no block follows.
    """

    index: int
    name: str
    module: nn.Module
    last: bool
    _walk: _Walk = field(repr=False)
    _place: _Place = field(repr=False)

    @property
    def hidden_states(self) -> list[Tensor]:
        """The batches (samples, length, hidden) where they wait: this block's inputs, and its outputs after `advance`."""
        return self._walk.hidden

    @property
    def targets(self) -> list[Tensor]:
        """The 16-bit model's outputs of this block, batches (samples, length, hidden); for walks with an original."""
        assert self._walk.targets is not None, "this walk has no original"
        return self._walk.targets

    @property
    def device(self) -> torch.device:
        """The compute device."""
        return self._walk.device

    def forward(self, batch: int) -> Tensor:
        """The block's output of one batch as it is now (samples, length, hidden), on the compute device, differentiable."""
        return self._walk.call(self.module, self.index, self._walk.hidden[batch])

    def call(self, hidden: Tensor) -> Tensor:
        """What the block makes of a batch of hidden states (samples, length, hidden), on the compute device, differentiable."""
        return self._walk.call(self.module, self.index, hidden)

    def autocast(self) -> AbstractContextManager[object]:
        """The number format that the walk computes in."""
        return self._walk.autocast()

    @contextmanager
    def present(self) -> Generator[None]:
        """While it lasts, the block is on the compute device, also when its turn is over."""
        self._place.enter()
        try:
            yield
        finally:
            self._place.leave()

    @contextmanager
    def outside(self, model: nn.Module, weights: Weights | None) -> Generator[None]:
        """While it lasts, a whole model is on the compute device, from whose blocks the caller has taken the weights."""
        place = _Place(model, "", self._walk, weights)
        place.enter()
        try:
            yield
        finally:
            place.leave()

    def grams(
        self,
        names: Sequence[str],
        *,
        dtype: torch.dtype = torch.float32,
        token_weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Gram]:
        """XᵀX of the inputs of layers in this block, over all calibration tokens, by one pass through the block as it is now.

        Args:
            names: Full paths in the model, each inside this block.
            dtype: Of the sums, float32 or float64.
            token_weights: Name to a weight for every token, (samples, length); None for one each.

        Returns:
            Name to Gram (in, in) on the compute device; layers with a common input share one object.

        Raises:
            ModelError: A layer lies in another block, or was never run.
        """
        layers: dict[str, nn.Module] = {}
        for name in names:
            if not name.startswith(f"{self.name}."):
                raise ModelError(
                    f"this layer is not in block {self.name}", where=f"layer {name}", remedy="ask the block it is in"
                )
            layers[name] = self.module.get_submodule(name.removeprefix(f"{self.name}."))
        if not layers:
            return {}
        self._place.enter()
        with GramAccumulator(layers, dtype=dtype, token_weights=token_weights) as accumulator:
            for batch in range(len(self._walk.hidden)):
                with torch.no_grad():
                    self.forward(batch)
                accumulator.next_batch()
            return accumulator.result()

    def advance(self) -> None:
        """Replace the hidden states by this block's outputs, once; iteration does it by itself between blocks."""
        if self._walk.done > self.index:
            return
        self._place.enter()
        self._walk.through(self.module, self.index, self._walk.hidden)
        self._walk.done = self.index + 1


def walk(
    model: nn.Module,
    tokens: Tensor,
    *,
    device: torch.device | str,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    weights: Weights | None = None,
    original: Original | None = None,
) -> Iterator[Block]:
    """Walk through a model's decoder blocks with calibration tokens.

    The last block is not run unless asked for by `Block.advance`. Every block's weights return to their device and dtype when its
    turn ends, also when the walk is left early; those of a skeleton, and what was put into it, go to the meta device.

    Args:
        model: A decoder-only model of transformers, quantized or not. Embeddings run where they are, so keep it on the CPU.
        tokens: int64 (samples, length), no padding.
        device: Where the block of the turn computes.
        batch_size: Samples a pass.
        dtype: Of the hidden states between blocks. float32 computes in float32 whatever the weights are; a half type computes
            under autocast.
        weights: Where a skeleton's weights are read; None for a model in memory.
        original: The 16-bit model to run beside it, for `Block.targets`; costs a second set of hidden states.

    Yields:
        Each block in its turn, its module on `device`.

    Raises:
        ModelError: No decoder blocks found, or a decoder that cannot be run block by block.
    """
    blocks = decoder_blocks(model)
    beside = decoder_blocks(original.model) if original is not None else None
    was_training = model.training
    model.eval()
    try:
        hidden, calls = record(model, blocks, tokens, batch_size=batch_size, dtype=dtype, weights=weights)
        home = _home(hidden, torch.device(device), streams=1 if beside is None else 2)
        hidden = [batch.to(home) for batch in hidden]
        state = _Walk(torch.device(device), dtype, home, hidden, calls, targets=list(hidden) if beside is not None else None)
        for index, (name, module) in enumerate(blocks):
            place = _Place(module, name, state, weights)
            block = Block(index, name, module, index + 1 == len(blocks), state, place)
            try:
                place.enter()
                if original is not None and beside is not None and state.targets is not None:
                    _run_beside(beside[index], index, state, place if original.model is model else None, original.weights)
                yield block
                if not block.last:
                    block.advance()
            finally:
                place.leave()
    finally:
        model.train(was_training)


def _run_beside(block: tuple[str, nn.Module], index: int, state: _Walk, entered: _Place | None, weights: Weights | None) -> None:
    """Move the 16-bit stream through a block, which is there already if it is the one walked through."""
    assert state.targets is not None, "asked for only with an original"
    name, module = block
    place = entered or _Place(module, name, state, weights)
    place.enter()
    try:
        state.through(module, index, state.targets)
    finally:
        if entered is None:
            place.leave()


class _Place:
    """Puts a block on the compute device, in float32 where the walk computes in it, and back to where and what it was."""

    def __init__(self, module: nn.Module, name: str, state: _Walk, weights: Weights | None) -> None:
        self._module = module
        self._name = name
        self._device = state.device
        self._exact = state.dtype == torch.float32
        self._weights = weights
        first = next(iter([*module.parameters(), *module.buffers()]), None)
        self._home = first.device if first is not None else torch.device("cpu")
        self._casts: dict[nn.Parameter, torch.dtype] = {}

    def enter(self) -> None:
        """Move what is not there yet: the caller may have put new layers into the block since the last time."""
        if self._weights is not None:
            fill(self._module, self._name, self._weights, device=self._device, dtype=None)
        self._module.to(self._device)
        for parameter in self._module.parameters() if self._exact else ():
            if parameter.dtype in HALF:
                # parameters only: buffers hold codes and scales whose dtype is part of their format
                self._casts[parameter] = parameter.dtype
                parameter.data = parameter.data.float()

    def leave(self) -> None:
        if self._weights is not None:
            self._casts.clear()
            drop(self._module)
            return
        for parameter, dtype in self._casts.items():
            parameter.data = parameter.data.to(dtype)
        self._casts.clear()
        self._module.to(self._home)


def _home(hidden: list[Tensor], device: torch.device, *, streams: int) -> torch.device:
    """Where the hidden states of so many models wait: on a GPU if they take at most an eighth of what is free there."""
    if device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(device)
    needed = streams * sum(batch.numel() * batch.element_size() for batch in hidden)
    return device if needed <= free // 8 else torch.device("cpu")


def _to(value: object, device: torch.device, moved: dict[int, object]) -> object:
    """Move the tensors in a nest of tuples, lists and dicts; what occurs twice is moved once."""
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if isinstance(value, dict):
        return {name: _to(item, device, moved) for name, item in cast("dict[str, object]", value).items()}
    if isinstance(value, tuple | list):
        items = [_to(item, device, moved) for item in cast("Sequence[object]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _first(output: object) -> Tensor:
    """A block's hidden states; some architectures return them first in a tuple."""
    return cast("Tensor", cast("Sequence[object]", output)[0] if isinstance(output, tuple) else output)
