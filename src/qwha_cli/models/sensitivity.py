"""How much the model's loss minds an error in each layer's output, token by token: squared gradients on the calibration text.

With g the gradient of the loss (cross-entropy of the text's own next tokens, in nats, summed) with respect to a layer's output,
an error δ of that output costs about ½ Σ (g · δ)². Over the outputs of a layer g² is taken as even, so that what is left is a
number for every token, and Σ_t w_t ‖E x_t‖² stands for the cost of an error E in the weight: the diagonal of the empirical Fisher
information, as GuidedQuant (Kim et al. 2025) and others use it. Many tokens hardly matter, and a few, whose activations are huge,
would else outweigh all others.

One pass forward and one backward through the 16-bit model, a block at a time: neither model nor graph must fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qwha_cli.models.targets import decoder_blocks
from qwha_cli.models.walk import Block, walk
from qwha_cli.models.weights import Weights

# hidden states between blocks that wait on the CPU for the way back
_WAITING_BYTES = 2 << 30

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sensitivity:
    """What the loss minds.

    Attributes:
        tokens: Layer or block to float32 (samples, length): its squared gradient of each token relative to the mean over all.
        means: Layer or block to that mean: over tokens and outputs, in squared nats per squared unit of output.
    """

    tokens: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Tensor]:
        """As tensors for a file; tokens in bfloat16."""
        tokens = {f"tokens.{name}": value.to(torch.bfloat16) for name, value in self.tokens.items()}
        return tokens | {f"mean.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.means.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Sensitivity:
        """Undo `to_tensors`."""
        parts = {name.split(".", 1)[0] for name in tensors}
        assert parts <= {"tokens", "mean"}, parts
        return cls(
            {name.removeprefix("tokens."): value.float() for name, value in tensors.items() if name.startswith("tokens.")},
            {name.removeprefix("mean."): float(value) for name, value in tensors.items() if name.startswith("mean.")},
        )


def measure_sensitivity(
    model: nn.Module,
    tokens: Tensor,
    *,
    device: torch.device | str,
    batch_size: int,
    dtype: torch.dtype,
    weights: Weights | None = None,
    progress: Progress = lambda done, total: None,
) -> Sensitivity:
    """Measure the sensitivity of every linear layer in the decoder blocks, and of every block's output.

    Args:
        model: The 16-bit model, in memory or a skeleton; left as it was.
        tokens: int64 (samples, length), no padding.
        device: Where to compute.
        batch_size: Samples a pass.
        dtype: As in `walk`.
        weights: Where a skeleton's weights are read; None for a model in memory.
        progress: Told how many of how many blocks are through, both ways.

    Returns:
        The sensitivity by the layers' and blocks' full names.

    Raises:
        ModelError: As `walk`.
    """
    blocks = len(decoder_blocks(model))
    size = batch_size * max(1, _WAITING_BYTES // (batch_size * _bytes_of_sample(model, tokens, blocks, dtype)))
    chunks = tokens.split(size)
    squares: dict[str, list[Tensor]] = {}
    for number, chunk in enumerate(chunks):
        through: list[tuple[Block, list[Tensor]]] = []
        for block in walk(model, chunk, device=device, batch_size=batch_size, dtype=dtype, weights=weights):
            through.append((block, [batch.cpu() for batch in block.hidden_states]))
            if block.last:
                block.advance()
            progress((2 * number) * blocks + len(through), 2 * blocks * len(chunks))
        gradients = _of_the_loss(model, through[-1][0], chunk.split(batch_size), weights)
        while through:
            block, states = through.pop()
            _backward(block, states, gradients, squares)
            progress((2 * number + 2) * blocks - len(through), 2 * blocks * len(chunks))
    return _relative(squares)


def _bytes_of_sample(model: nn.Module, tokens: Tensor, blocks: int, dtype: torch.dtype) -> int:
    hidden = int(getattr(getattr(model, "config"), "hidden_size"))  # noqa: B009 - not known to nn.Module
    return blocks * tokens.shape[1] * hidden * dtype.itemsize


def _relative(squares: dict[str, list[Tensor]]) -> Sensitivity:
    found = Sensitivity()
    for name, parts in squares.items():
        every = torch.cat(parts)
        mean = float(every.mean(dtype=torch.float64))
        found.means[name] = mean
        found.tokens[name] = every / mean if mean > 0 else torch.ones_like(every)
    return found


def _of_the_loss(model: nn.Module, last: Block, batches: Sequence[Tensor], weights: Weights | None) -> list[Tensor]:
    """The gradient of the summed loss with respect to the last block's outputs, batches (samples, length, hidden) on the CPU."""
    given = _Given()
    gradients: list[Tensor] = []
    with _replaced(model, given), last.outside(model, weights):
        for hidden, batch in zip(last.hidden_states, batches, strict=True):
            rows: list[Tensor] = []
            for states, ids in zip(
                hidden.split(1), batch.to(last.device).split(1), strict=True
            ):  # logits of one sample are large
                given.hidden = states.detach().to(last.device).requires_grad_()
                with torch.enable_grad(), last.autocast():
                    logits = cast(Tensor, model(input_ids=ids, use_cache=False).logits)
                    loss = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
                rows.append(torch.autograd.grad(loss, given.hidden)[0].to(device="cpu", dtype=hidden.dtype))
            gradients.append(torch.cat(rows))
    return gradients


def _backward(block: Block, states: list[Tensor], gradients: list[Tensor], squares: dict[str, list[Tensor]]) -> None:
    """Take the gradient of a block's outputs to its inputs, in place, and note the squares on the way."""
    linears = {f"{block.name}.{path}": m for path, m in block.module.named_modules() if isinstance(m, nn.Linear)}
    with block.present(), _noted(linears, squares):
        block.module.requires_grad_(False)
        for batch, hidden in enumerate(states):
            squares.setdefault(block.name, []).append(gradients[batch].float().square().mean(-1))
            with torch.enable_grad():
                inputs = hidden.detach().to(block.device).requires_grad_()
                outputs = block.call(inputs)
            found = torch.autograd.grad(outputs, inputs, gradients[batch].to(outputs))[0]
            gradients[batch] = found.to(device="cpu", dtype=hidden.dtype)


@contextmanager
def _noted(layers: Mapping[str, nn.Module], squares: dict[str, list[Tensor]]) -> Generator[None]:
    """While it lasts, the squared gradient of every token of the layers' outputs is noted in a backward pass."""

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def note(gradient: Tensor) -> None:
            squares.setdefault(name, []).append(gradient.detach().float().square().mean(-1).cpu())

        return lambda module, inputs, output: cast(None, output.register_hook(note) and None)

    handles: list[RemovableHandle] = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Given(nn.Module):
    """Stands in every block's place and returns the last one's outputs."""

    hidden: Tensor

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """What it was given."""
        return self.hidden


@contextmanager
def _replaced(model: nn.Module, given: _Given) -> Generator[None]:
    """While it lasts, all decoder blocks are `given`; attributes that a decoder reads of its blocks are the blocks' own."""
    blocks = decoder_blocks(model)
    modules = cast("nn.ModuleList", model.get_submodule(blocks[0][0].rpartition(".")[0]))
    try:
        for index, (_, block) in enumerate(blocks):
            modules[index] = _Stand(given, block)
        yield
    finally:
        for index, (_, block) in enumerate(blocks):
            modules[index] = block


class _Stand(nn.Module):
    def __init__(self, given: _Given, block: nn.Module) -> None:
        super().__init__()
        # in a tuple: as submodules they would be counted and moved
        self._held = (given, block)

    def __getattr__(self, name: str) -> object:  # pyright: ignore[reportIncompatibleMethodOverride] - nn.Module returns Any
        return getattr(self._held[1], name) if not name.startswith("_") else super().__getattr__(name)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self._held[0](*args, **kwargs)
