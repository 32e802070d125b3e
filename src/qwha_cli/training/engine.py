"""What turns batches into an updated model: device, ranks, arithmetic, gradient, optimizer. Knows no steps, files or watchers.

    loss of a step = sum over its answer tokens of -log p(token) / number of its answer tokens

taken over all forwards and all ranks of the step together, so neither accumulation, nor padding, nor the number of processes
changes what is minimised. Only parameters with `requires_grad` are trained; they and the optimizer's moments stay in fp32.
"""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Generator, Mapping, Sequence
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, KwargsHandler
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwha_cli.data.collate import pad_batch
from qwha_cli.data.tokenize import Encoded
from qwha_cli.errors import ResourceError, UsageError
from qwha_cli.models.liger import FusedHead, apply_to_layers, choose_kernels, fused_head
from qwha_cli.models.token_loss import count_labelled, summed_loss
from qwha_cli.training.batches import StepBatches
from qwha_cli.training.optim import build_optimizer, restore_tensors, set_learning_rate, trained_parameters, training_tensors
from qwha_cli.training.precision import autocasting, choose_precision
from qwha_cli.training.settings import TrainSettings


class Engine:
    """A model in training on this rank.

    Args:
        model: A causal language model of transformers, usually under peft. Stays on its device if there is one process;
            of several, each moves it to its own.
        settings: How to train.

    Raises:
        UsageError: Nothing requires a gradient.
    """

    def __init__(self, model: nn.Module, *, settings: TrainSettings) -> None:
        device = next(model.parameters()).device
        # DDP would send every buffer (the packed base!) from rank 0 before each forward; they are equal and frozen.
        handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        self.accelerator = Accelerator(cpu=device.type == "cpu", device_placement=False, kwargs_handlers=handlers)
        self.ranks: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.device: torch.device = self.accelerator.device if self.ranks > 1 else device
        self.model = model.to(self.device)
        self.wrapped: nn.Module = model
        self.settings = settings
        self.parameters = trained_parameters(model)
        if not self.parameters:
            raise UsageError("the model has no parameter to train", where="train", remedy="add an adapter before training")
        self.optimizer = build_optimizer(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.precision = choose_precision(settings.precision, device=self.device)
        self.kernels = choose_kernels(settings.kernels, model=self._causal_model(), device=self.device)
        self._head: FusedHead | None = None
        if self.kernels.layers:
            apply_to_layers(self._causal_model())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def training(self) -> Generator[None]:
        """Put the model into training mode for the block, wrapped if there are several ranks, and into eval mode after.

        The caller's random state is left as it was.
        """
        base = self._causal_model()
        if self.settings.checkpointing:
            # the re-entrant form would need a gradient on the frozen embeddings' output
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # pyright: ignore
        self.model.train()
        if self.ranks > 1:
            self.wrapped = self.accelerator.prepare_model(self.model, device_placement=False)
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

    def gradient(self, batches: StepBatches) -> tuple[float, float, int]:
        """Accumulate a step's gradient over its forwards and the ranks, and clip it.

        Returns:
            The step's loss, the gradient's norm before clipping, and the tokens read; all over every rank.

        Raises:
            ResourceError: The device's memory is too small.
        """
        answers = sum(count_labelled(forward["labels"]) for forward in batches.forwards)
        answers_in_all, tokens = (int(n) for n in self._sum(torch.tensor([answers, batches.tokens])))
        # DDP averages gradients over the ranks, while the mean over tokens wants their sum.
        factor = self.ranks / answers_in_all
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._memory_guard():
            for number, forward in enumerate(batches.forwards, start=1):
                exchange = number == len(batches.forwards) or self.ranks == 1
                with contextlib.nullcontext() if exchange else self.accelerator.no_sync(self.wrapped):
                    with autocasting(self.precision.autocast, device=self.device):
                        loss = summed_loss(self.wrapped, self._on_device(forward), head=self._head)
                    (loss * factor).backward()
                total += loss.detach().double()
            clip = self.settings.clip if self.settings.clip is not None else math.inf
            norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), clip)
        return float(self._sum(total)) / answers_in_all, float(norm), tokens

    def update(self, lr: float) -> None:
        """Take an optimizer step along the accumulated gradient and forget it."""
        set_learning_rate(self.optimizer, lr)
        with self._memory_guard():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def mean_loss(self, encoded: Sequence[Encoded]) -> float:
        """The mean loss a token over examples, nats, without gradient, in the training's arithmetic; the ranks share the work."""
        size = max(1, self.settings.batch_size // self.ranks)
        # similar lengths side by side waste the least padding
        mine = sorted(encoded, key=lambda example: len(example.input_ids))[self.rank :: self.ranks]
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.model.eval()
        with torch.no_grad(), self._memory_guard(), autocasting(self.precision.autocast, device=self.device):
            for start in range(0, len(mine), size):
                batch = self._on_device(pad_batch(mine[start : start + size], pad_id=self.settings.pad_id))
                sums[0] += summed_loss(self.model, batch, head=self._head).double()
                sums[1] += count_labelled(batch["labels"])
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
        self.accelerator.wait_for_everyone()

    def peak_gib(self) -> float:
        """Most memory held so far: allocated on a CUDA device, else resident in this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _causal_model(self) -> PreTrainedModel:
        """The causal language model under peft's wrapper."""
        get_base_model = getattr(self.model, "get_base_model", None)
        return cast(PreTrainedModel, get_base_model() if callable(get_base_model) else self.model)

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _sum(self, tensor: Tensor) -> Tensor:
        if self.ranks == 1:
            return tensor
        tensor = tensor.to(self.device)
        torch.distributed.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def _memory_guard(self) -> Generator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            # torch's CPU allocator has no error class of its own
            known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
            if not known:
                raise
            cause = (str(error) or "out of memory").splitlines()[0]
            raise ResourceError(
                f"{self.device} has too little memory for a training step ({cause})",
                where="train",
                remedy="lower train.batch_size (raise train.accumulation to keep the step), set train.checkpointing=true, "
                "or lower train.max_length; checkpoints are kept",
            ) from error
