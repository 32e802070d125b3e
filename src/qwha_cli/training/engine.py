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

from qwha_cli.adapters.fp8 import Fp8Choice, choose_fp8, fp8_products
from qwha_cli.adapters.fused_blocks import FusedChoice, choose_fused_blocks, fused_blocks
from qwha_cli.adapters.keep import renew_kept
from qwha_cli.data.collate import pad_batch
from qwha_cli.data.flatten import FlatShape, equal_length, flat_batch
from qwha_cli.data.tokenize import IGNORED, Encoded
from qwha_cli.errors import RanksError, ResourceError, UsageError
from qwha_cli.models.liger import FusedHead, apply_to_layers, choose_kernels, fused_head
from qwha_cli.models.token_loss import causal_model, count_labelled, summed_loss
from qwha_cli.models.varlen import choose_attention, varlen_attention
from qwha_cli.training.batches import StepBatches
from qwha_cli.training.gradients import FlatGradients
from qwha_cli.training.optim import build_optimizer, restore_tensors, set_learning_rate, trained_parameters, training_tensors
from qwha_cli.training.precision import autocasting, choose_precision
from qwha_cli.training.settings import TrainSettings
from qwha_cli.training.sharded_base import ShardedBase
from qwha_cli.training.step_graphs import CannotRecord, LaunchChoice, StepGraphs, choose_launch, draws_at_random

# Longer than any step or checkpoint, and short enough that a machine that is gone is noticed.
_TIMEOUT = timedelta(minutes=10)
# Adapters have a few hundred tensors of some hundred thousand values. Buckets of 25 MB (torch's default) leave a dozen exchanges,
# all but the last of which run beside the backward pass.
_BUCKET_MB = 25
# Recorded passes need few shapes: tokens are rounded up to 256 or, of large batches, a 32nd, and sequences to 16.
_TOKEN_MULTIPLE, _TOKEN_SHARE, _SEQUENCE_MULTIPLE = 256, 32, 16


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
        self.notes: list[str] = []
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
        base = causal_model(model)
        self.fp8: Fp8Choice = choose_fp8(model, wanted=self.precision.fp8)
        self.kernels = choose_kernels(settings.kernels, model=base, device=self.device)
        dtype = self.precision.autocast or base.dtype
        self.fused: FusedChoice = choose_fused_blocks(base, wanted=settings.kernels != "torch", device=self.device, dtype=dtype)
        self.attention = choose_attention(settings.attention, model=base, device=self.device, dtype=dtype)
        self.launch: LaunchChoice = choose_launch(
            settings.launch,
            model=base,
            device=self.device,
            flat=self.attention.varlen,
            sharded=self._sharded is not None,
        )
        self.flat: FlatShape | None = self._flat_shape() if self.attention.varlen else None
        self._head: FusedHead | None = None
        self._gradients: FlatGradients | None = None
        self._graphs: StepGraphs | None = None
        # on the device, because a recorded pass reads it from there
        self._factor = torch.zeros((), device=self.device)
        if self.kernels.layers:
            apply_to_layers(base)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def reasons(self) -> tuple[str, ...]:
        """What was chosen for this device and why, for the run's notes."""
        precision = (self.precision.reason, *self.fp8.reasons)
        if self.device.type != "cuda":
            # three sentences that a GPU is missing would hide the one that says something
            others = f"transformers' own layers, padded batches and single kernels, as always on {self.device.type}"
            return *precision, others
        return *precision, self.kernels.reason, self.fused.reason, self.attention.reason, self.launch.reason

    @contextlib.contextmanager
    def training(self) -> Generator[None]:
        """Put the model into training mode for the block, wrapped if there are several ranks, and into eval mode after.

        The caller's random state is left as it was.
        """
        base = causal_model(self.model)
        if self.settings.checkpointing:
            # the re-entrant form would need a gradient on the frozen embeddings' output
            how = {"use_reentrant": False, "preserve_rng_state": draws_at_random(base)}
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # pyright: ignore
            # transformers makes that gradient wanted nevertheless, and the first block computes it for nobody
            base.disable_input_require_grads()  # pyright: ignore
        self.model.train()
        if self.launch.graph:
            self._gradients = FlatGradients(self.parameters.values())
            self._graphs = StepGraphs(self._passes, device=self.device)
        elif self.ranks > 1:
            self.wrapped = self._distributed()
        try:
            with contextlib.ExitStack() as stack:
                self._head = stack.enter_context(fused_head(base)) if self.kernels.loss else None
                stack.enter_context(fp8_products(self.fp8))
                if self.fused.fused:
                    stack.enter_context(fused_blocks(base))
                if self.flat is not None:
                    stack.enter_context(varlen_attention(base))
                stack.enter_context(torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []))
                yield
        finally:
            self._head = self._graphs = self._gradients = None
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
        wrapped = isinstance(self.wrapped, DistributedDataParallel)
        # DDP averages gradients over the ranks, while the mean over tokens wants their sum.
        self._factor.fill_((self.ranks if wrapped else 1) / batches.answers)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._explained():
            if self._graphs is not None:
                renew_kept(self.model)
            for number, forward in enumerate(batches.forwards, start=1):
                # the ranks exchange gradients once a step, however many forwards it has
                alone = wrapped and number < len(batches.forwards)
                with self.wrapped.no_sync() if alone else contextlib.nullcontext():  # pyright: ignore
                    total += self._run(forward).double()
            if self._gradients is not None and self.ranks > 1:
                self._gradients.sum_over_ranks()
            clip = self.settings.clip if self.settings.clip is not None else math.inf
            norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), clip)
            meanwhile()
        return float(self._sum(total)) / batches.answers, float(norm), batches.tokens

    def _run(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward and backward of a batch, replayed if that is how this engine works; return its summed loss."""
        equal = None if self.flat is None else equal_length(batch)
        if self._graphs is None:
            return self._passes(self._on_device(batch), equal)
        try:
            return self._graphs({name: tensor.pin_memory() for name, tensor in batch.items()}, equal)
        except CannotRecord as error:
            if self.settings.launch == "graph":
                raise UsageError(
                    f"the step cannot be recorded as a CUDA graph: {error}", where="train.launch", remedy="use auto, or eager"
                ) from error
            self._graphs = None
            self.notes.append(f"kernels are launched one by one: the step could not be recorded as a CUDA graph ({error})")
            return self._passes(self._on_device(batch), equal)

    def _passes(self, batch: Mapping[str, Tensor], equal: int | None) -> Tensor:
        """Forward and backward of a batch on the device, which is never waited for if the batch is flat."""
        with autocasting(self.precision.autocast, device=self.device):
            loss = summed_loss(self.wrapped, batch, head=self._head, longest=self._longest, equal=equal)
        (loss * self._factor).backward()
        return loss.detach()

    def update(self, lr: float) -> None:
        """Take an optimizer step along the accumulated gradient and forget it."""
        set_learning_rate(self.optimizer, lr)
        with self._explained():
            self.optimizer.step()
        # fused kernels write into the values without counting it, and what was computed from them would seem up to date
        torch.autograd.graph.increment_version(self.parameters.values())
        if self._gradients is not None:
            self._gradients.zero()
        else:
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
                batch, count = self._held_out(mine[start : start + size])
                sums[1] += count
                sums[0] += summed_loss(self.model, self._on_device(batch), head=self._head, longest=self._longest).double()
            if self._sharded is not None:
                # whoever has fewer batches still has to give the others its part of every block
                most = -(-len(ordered[:: self.ranks]) // size)
                for _ in range(most - -(-len(mine) // size)):
                    batch, _ = self._held_out(ordered[:1])
                    summed_loss(self.model, self._on_device(batch), head=self._head, longest=self._longest)
        self.model.train()
        total, count = self._sum(sums).tolist()
        return total / max(1.0, count)

    def _held_out(self, encoded: Sequence[Encoded]) -> tuple[dict[str, Tensor], int]:
        """A batch for `mean_loss` and its labelled tokens, counted before it goes to a GPU, which would be waited for."""
        if self.flat is None:
            batch = pad_batch(encoded, pad_id=self.settings.pad_id)
            return batch, count_labelled(batch["labels"])
        batch = flat_batch(encoded, pad_id=self.settings.pad_id, shape=FlatShape(self.flat.longest))
        return batch, int(torch.count_nonzero(batch["targets"] != IGNORED))

    def _flat_shape(self) -> FlatShape:
        longest = self.settings.max_length
        if not self.launch.graph:
            return FlatShape(longest)
        # a power of two, so that a 32nd of a batch of the next size is a multiple of this one's
        share = self.settings.batch_size // self.ranks * longest // _TOKEN_SHARE
        multiple = max(_TOKEN_MULTIPLE, 1 << max(0, share.bit_length() - 1))
        return FlatShape(longest, tokens=multiple, places=multiple, sequences=_SEQUENCE_MULTIPLE)

    @property
    def _longest(self) -> int | None:
        return None if self.flat is None else self.flat.longest

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
                "train.keep=memory, or lower train.max_length; checkpoints are kept",
            ) from error


def _lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone; gloo has no error class of its own for that."""
    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
    return isinstance(error, kinds) or any(
        word in str(error) for word in ("gloo/", "onnection closed by peer", "onnection reset")
    )
