"""What turns batches into an updated model: device, ranks, arithmetic, gradient, optimizer. Knows no steps, files or watchers.

    loss of a step = sum over its answer tokens of -log p(token) / number of its answer tokens

taken over all forwards and all ranks of the step together, so neither accumulation, nor padding, nor the number of processes
changes what is minimised. Only parameters with `requires_grad` are trained; they and the optimizer's moments stay in fp32.
"""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qwha_cli.data.collate import pad_batch
from qwha_cli.data.tokenize import Encoded
from qwha_cli.errors import RanksError, ResourceError, UsageError
from qwha_cli.models.liger import FusedHead, apply_to_layers, choose_kernels, fused_head
from qwha_cli.models.token_loss import causal_model, count_labelled, summed_loss
from qwha_cli.training.batches import StepBatches
from qwha_cli.training.optim import build_optimizer, restore_tensors, set_learning_rate, trained_parameters, training_tensors
from qwha_cli.training.precision import autocasting, choose_precision
from qwha_cli.training.settings import TrainSettings
from qwha_cli.training.sharded_base import ShardedBase

# Longer than any step or checkpoint, and short enough that a machine that is gone is noticed.
_TIMEOUT = timedelta(minutes=10)
# Adapters have a few hundred tensors of some hundred thousand values. Buckets of 25 MB (torch's default) leave a dozen exchanges,
# all but the last of which run beside the backward pass.
_BUCKET_MB = 25


class Engine:
    """A model in training on this rank.

    Args:
        model: A causal language model of transformers, usually under peft. Stays on its device if there is one process;
            of several, each moves it to its own. On the CPU, if its packed base is to be split over the ranks.
        settings: How to train.

    Raises:
        UsageError: Nothing requires a gradient.
    """

    def __init__(self, model: nn.Module, *, settings: TrainSettings) -> None:
        device = next(model.parameters()).device
        target = settings.shard_on or device
        # its state alone: an Accelerator would wrap model and arithmetic by what `accelerate launch` was configured with
        self.state = PartialState(cpu=target.type == "cpu", timeout=_TIMEOUT)
        self.ranks: int = self.state.num_processes
        self.rank: int = self.state.process_index
        self.device: torch.device = (self.state.device or target) if self.ranks > 1 else target
        self._sharded: ShardedBase | None = None
        if settings.shard_on is not None and self.ranks > 1:
            self._sharded = ShardedBase(causal_model(model), rank=self.rank, ranks=self.ranks, device=self.device)
        self.model = model.to(self.device)
        self.wrapped: nn.Module = model
        self.settings = settings
        self.parameters = trained_parameters(model)
        if not self.parameters:
            raise UsageError("the model has no parameter to train", where="train", remedy="add an adapter before training")
        self.optimizer = build_optimizer(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, name=settings.optimizer
        )
        self.precision = choose_precision(settings.precision, device=self.device)
        self.kernels = choose_kernels(settings.kernels, model=causal_model(model), device=self.device)
        self._head: FusedHead | None = None
        if self.kernels.layers:
            apply_to_layers(causal_model(model))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def training(self) -> Generator[None]:
        """Put the model into training mode for the block, wrapped if there are several ranks, and into eval mode after.

        The caller's random state is left as it was.
        """
        base = causal_model(self.model)
        if self.settings.checkpointing:
            # the re-entrant form would need a gradient on the frozen embeddings' output
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # pyright: ignore
        self.model.train()
        if self.ranks > 1:
            self.wrapped = self._distributed()
        try:
            with contextlib.ExitStack() as stack:
                self._head = stack.enter_context(fused_head(base)) if self.kernels.loss else None
                stack.enter_context(torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []))
                yield
        finally:
            self._head = None
            if self.settings.checkpointing:
                base.gradient_checkpointing_disable()  # pyright: ignore
            self.optimizer.zero_grad(set_to_none=True)
            self.model.eval()
            if self._sharded is not None:
                self._sharded.end()

    def _distributed(self) -> DistributedDataParallel:
        """The model under DDP, by hand: accelerate would take bucket sizes and more from its own configuration."""
        names = {name for name, _ in [*self.model.named_parameters(), *self.model.named_buffers()]}
        # frozen and equal: sending the packed base from rank 0, at the start and before each forward, would only cost time
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # pyright: ignore[reportPrivateUsage]
            self.model, [name for name in names if name not in self.parameters]
        )
        with self._explained():
            return DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,  # else every gradient exists twice
                bucket_cap_mb=_BUCKET_MB,
            )

    def gradient(self, batches: StepBatches, *, meanwhile: Callable[[], None] = lambda: None) -> tuple[float, float, int]:
        """Accumulate a step's gradient over its forwards and the ranks, and clip it.

        Args:
            batches: This rank's part of the step.
            meanwhile: Called when a GPU has been given all its work and before its results are waited for.

        Returns:
            The step's loss, the gradient's norm before clipping, and the tokens read; all over every rank.

        Raises:
            ResourceError: The device's memory is too small.
        """
        # DDP averages gradients over the ranks, while the mean over tokens wants their sum.
        factor = self.ranks / batches.answers
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._explained():
            for number, forward in enumerate(batches.forwards, start=1):
                last = number == len(batches.forwards)
                # the ranks exchange gradients once a step, however many forwards it has
                alone = isinstance(self.wrapped, DistributedDataParallel) and not last
                with self.wrapped.no_sync() if alone else contextlib.nullcontext():  # pyright: ignore
                    with autocasting(self.precision.autocast, device=self.device):
                        loss = summed_loss(self.wrapped, self._on_device(forward), head=self._head)
                    (loss * factor).backward()
                total += loss.detach().double()
            clip = self.settings.clip if self.settings.clip is not None else math.inf
            norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), clip)
            meanwhile()
        return float(self._sum(total)) / batches.answers, float(norm), batches.tokens

    def update(self, lr: float) -> None:
        """Take an optimizer step along the accumulated gradient and forget it."""
        set_learning_rate(self.optimizer, lr)
        with self._explained():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def mean_loss(self, encoded: Sequence[Encoded]) -> float:
        """The mean loss a token over examples, nats, without gradient, in the training's arithmetic; the ranks share the work."""
        size = max(1, self.settings.batch_size // self.ranks)
        # similar lengths side by side waste the least padding
        ordered = sorted(encoded, key=lambda example: len(example.input_ids))
        mine = ordered[self.rank :: self.ranks]
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.model.eval()
        with torch.no_grad(), self._explained(), autocasting(self.precision.autocast, device=self.device):
            for start in range(0, len(mine), size):
                batch = pad_batch(mine[start : start + size], pad_id=self.settings.pad_id)
                # counted before it goes to a GPU, which would be waited for
                sums[1] += count_labelled(batch["labels"])
                sums[0] += summed_loss(self.model, self._on_device(batch), head=self._head).double()
            if self._sharded is not None:
                # whoever has fewer batches still has to give the others its part of every block
                most = -(-len(ordered[:: self.ranks]) // size)
                for _ in range(most - -(-len(mine) // size)):
                    summed_loss(self.model, self._on_device(pad_batch(ordered[:1], pad_id=self.settings.pad_id)), head=self._head)
        self.model.train()
        total, count = self._sum(sums).tolist()
        return total / max(1.0, count)

    def tensors(self) -> dict[str, Tensor]:
        """Values and optimizer state for a checkpoint, on the CPU."""
        return training_tensors(self.parameters, self.optimizer)

    def restore(self, tensors: Mapping[str, Tensor], *, where: str) -> None:
        """Put back what `tensors` gave; `where` names the checkpoint in errors."""
        restore_tensors(tensors, self.parameters, optimizer=self.optimizer, where=where)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up on any rank: all must stop at the same step."""
        return bool(self._sum(torch.tensor(int(flag))))

    def wait(self) -> None:
        """Let every rank come to this place."""
        with self._explained():
            self.state.wait_for_everyone()

    def peak_gib(self) -> float:
        """Most memory held so far: allocated on a CUDA device, else resident in this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type != "cuda":
            return {name: tensor.to(self.device) for name, tensor in batch.items()}
        # from pageable memory a copy would wait for the device
        return {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _sum(self, tensor: Tensor) -> Tensor:
        if self.ranks == 1:
            return tensor
        tensor = tensor.to(self.device)
        with self._explained():
            torch.distributed.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def _explained(self) -> Generator[None]:
        """Turn what memory and lost processes look like in torch into errors for people."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            # torch's CPU allocator has no error class of its own
            known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
            if self.ranks > 1 and _lost_contact(error):
                raise RanksError(
                    f"process {self.rank} lost contact with the others",
                    where="train",
                    remedy="see what ended them; checkpoints are kept, and the same command continues",
                ) from error
            if not known:
                raise
            cause = (str(error) or "out of memory").splitlines()[0]
            raise ResourceError(
                f"{self.device} has too little memory for a training step ({cause})",
                where="train",
                remedy="lower train.batch_size (raise train.accumulation to keep the step), set train.checkpointing=true, "
                "or lower train.max_length; checkpoints are kept",
            ) from error


def _lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone; gloo has no error class of its own for that."""
    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
    return isinstance(error, kinds) or any(
        word in str(error) for word in ("gloo/", "onnection closed by peer", "onnection reset")
    )
