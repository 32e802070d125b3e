"""Forward and backward passes recorded as CUDA graphs: a step of a 3B model is thousands of kernels, and with one sequence Python
takes several times as long to launch them as the device to run them (docs/results/speed.md).

A graph replays exactly the launches that were recorded, on the same memory. So it belongs to one set of shapes; batches are
rounded up to few of them (data/flatten.py). The first batch of a shape runs as it is, which also compiles kernels and fills
caches, the second is recorded, and from then on batches are copied into place and replayed. Gradients have to lie still
(gradients.py). All graphs share one pool of memory, since no two run at a time and nothing but the loss is read after one. A
first run takes as much once more, and where the device no longer has that, the graphs make way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwha_cli.errors import UsageError

Launch = Literal["auto", "graph", "eager"]

# each takes some megabytes of the driver's memory; shapes that come seldom are recorded again
_MOST_GRAPHS = 32
# rotary embeddings whose frequencies depend on the longest position, which they ask the device for
_ASKING_ROTATIONS = ("dynamic", "longrope")

Passes = Callable[[Mapping[str, Tensor], int | None], Tensor]
Shapes = tuple[int | None, tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass(frozen=True)
class LaunchChoice:
    """What was chosen, and why.

    Attributes:
        graph: Whether passes are recorded and replayed.
        reason: One sentence for the run's notes.
    """

    graph: bool
    reason: str


def choose_launch(requested: Launch, *, model: nn.Module, device: torch.device, flat: bool, sharded: bool) -> LaunchChoice:
    """Decide between recorded passes and kernels launched one by one.

    Args:
        requested: What the recipe says; `auto` records where nothing is known to prevent it.
        model: A causal language model of transformers, not wrapped.
        device: Where it will be trained.
        flat: Whether batches are flat (data/flatten.py). Others make the forward wait for the device.
        sharded: Whether the base is gathered from several devices during the passes.

    Raises:
        UsageError: `graph` was asked for and cannot be had.
    """
    if requested == "eager":
        return LaunchChoice(False, "kernels are launched one by one, as the recipe asks")
    obstacle = _obstacle(model, device=device, flat=flat, sharded=sharded)
    if obstacle is None:
        return LaunchChoice(True, "forward and backward passes are CUDA graphs, recorded when a shape comes for the second time")
    if requested == "graph":
        raise UsageError(
            f"passes cannot be recorded as CUDA graphs: {obstacle}", where="train.launch", remedy="use auto, or eager"
        )
    return LaunchChoice(False, f"kernels are launched one by one: {obstacle}")


def draws_at_random(model: nn.Module) -> bool:
    """Whether a forward pass in training mode draws random numbers."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    return any(isinstance(module, kinds) and module.p > 0 for module in model.modules())


def _obstacle(model: nn.Module, *, device: torch.device, flat: bool, sharded: bool) -> str | None:
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, not {device.type}"
    if sharded:
        return "the base is gathered from several GPUs while a pass runs"
    if not flat:
        return "padded batches make the forward wait for the device"
    if draws_at_random(model):
        return "the model drops activations at random"
    config = getattr(model, "config", None)
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rotation in _ASKING_ROTATIONS:
        return f"{rotation} rotary embeddings ask the device for the longest position"
    if isinstance(model, PreTrainedModel) and any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        return "the embeddings are trained, and their gradient waits for the device"
    return None


class CannotRecord(Exception):
    """A pass did something that a CUDA graph cannot hold; the model, the gradients and the device are as before."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: dict[str, Tensor]
    loss: Tensor


class StepGraphs:
    """Runs passes, from the second of a shape on by replaying them.

    Args:
        passes: Takes a batch on the device, and the length of its sequences if that is the same for all; runs forward and
            backward, adds the gradients to tensors that stay where they are, and returns the loss. Must not wait for the
            device. What else it reads is read where it lay when it was recorded.
        device: A CUDA device.
        most: Graphs kept at a time.
    """

    def __init__(self, passes: Passes, *, device: torch.device, most: int = _MOST_GRAPHS) -> None:
        self._passes = passes
        self._device = device
        self._most = most
        self._seen: set[Shapes] = set()
        self._graphs: OrderedDict[Shapes, _Recorded] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        # of the first runs too, so that libraries take their workspaces once
        self._stream = torch.cuda.Stream(device)
        # the most bytes that a first run had to ask the driver for
        self._need = 0

    def __call__(self, batch: Mapping[str, Tensor], equal: int | None) -> Tensor:
        """Run the passes of a batch; the loss is overwritten by the next call.

        Args:
            batch: Tensors on the device, or in pinned host memory.
            equal: The length of all sequences, if it is the same; a number of the recording, like the shapes.

        Raises:
            CannotRecord: The pass cannot be recorded. Nothing of it has run.
        """
        shapes = equal, tuple((name, tuple(tensor.shape)) for name, tensor in batch.items())
        found = self._graphs.get(shapes)
        if found is None:
            moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
            if shapes not in self._seen:
                self._seen.add(shapes)
                return self._run(moved, equal)
            found = self._record(shapes, moved)
        else:
            for name, tensor in batch.items():
                found.batch[name].copy_(tensor, non_blocking=True)
            self._graphs.move_to_end(shapes)
        found.graph.replay()
        return found.loss

    def _run(self, batch: dict[str, Tensor], equal: int | None) -> Tensor:
        """The passes as they are."""
        if self._graphs and torch.cuda.mem_get_info(self._device)[0] < self._need:
            # what was recorded holds as much as this run needs; it comes again
            self._graphs.clear()
            torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._passes(batch, equal)
        current.wait_stream(self._stream)
        self._need = max(self._need, torch.cuda.memory_reserved(self._device) - before)
        return loss

    def clear(self) -> None:
        """Forget all that was recorded: something that the passes read has moved."""
        self._graphs.clear()
        self._seen.clear()

    def _record(self, shapes: Shapes, batch: dict[str, Tensor]) -> _Recorded:
        while len(self._graphs) >= self._most:
            self._graphs.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                loss = self._passes(batch, shapes[0])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CannotRecord(str(error).splitlines()[0]) from error
        self._graphs[shapes] = _Recorded(graph, batch, loss)
        return self._graphs[shapes]
