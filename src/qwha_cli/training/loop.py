"""The training loop: every trained value of an otherwise frozen model, step by step, the same on one process or many.

Every step's examples are a function of (seed, step), its random stream of (seed, step, rank), its learning rate of the step. So
values, optimizer moments and the number of steps done are all that a checkpoint needs, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from qwha_cli.adapters.fp8 import advice
from qwha_cli.data.tokenize import Encoded
from qwha_cli.errors import DataError, Interrupted, NumericsError
from qwha_cli.training.batches import Batches, StepBatches, stream_seed
from qwha_cli.training.checkpoint import CheckpointState, list_checkpoints, load_latest, remove_drafts, save_checkpoint
from qwha_cli.training.engine import Engine
from qwha_cli.training.metrics import MetricsLog, ProgressSink, StepMetrics, ValidationPoint, read_metrics
from qwha_cli.training.optim import learning_rate
from qwha_cli.training.settings import TrainResult, TrainSettings


def train(
    model: nn.Module,
    encoded_train: Sequence[Encoded],
    *,
    encoded_validation: Sequence[Encoded],
    settings: TrainSettings,
    work_dir: Path,
    identity: str,
    progress: ProgressSink,
    interrupted: Callable[[], bool],
) -> TrainResult:
    """Train every parameter that requires a gradient, in place; continue from `work_dir` if a checkpoint lies there.

    Args:
        model: A causal language model of transformers, usually under peft, values to train in fp32. Left in eval mode.
        encoded_train: The examples. Those without a trained token are passed over.
        encoded_validation: Held-out examples for watching; may be empty.
        settings: How to train.
        work_dir: Holds `checkpoints/` and `metrics.jsonl`; survives a kill.
        identity: Digest of everything that must be the same when continuing.
        progress: Who watches; called on the first rank only.
        interrupted: Asked after every step; True saves a checkpoint and stops.

    Raises:
        UsageError: The batch does not divide by the ranks, or nothing can be trained.
        DataError: No example has a token to train on.
        ArtifactError: The checkpoint belongs to another run or cannot be read.
        NumericsError: The loss or the gradient is not finite; the checkpoints before it stay.
        ResourceError: Memory or disk ran out.
        Interrupted: The user stopped; the state is saved.
    """
    engine = Engine(model, settings=settings)
    batches = _batches(encoded_train, engine)
    total_steps = settings.steps or batches.total_steps(settings.epochs or 1.0)
    run = _Run(engine, total_steps=total_steps, work_dir=work_dir, progress=progress)
    with engine.training():
        done = resumed_from = run.resume(identity)
        run.announce(resumed_from, tokens=batches.mean_tokens())
        if done == 0:
            run.validate(encoded_validation)
        while done < run.total_steps:
            run.take_step(batches, done)
            done += 1
            if settings.validate_every is not None and (done % settings.validate_every == 0 or done == run.total_steps):
                run.validate(encoded_validation, after=done)
            stop = engine.any_rank(interrupted())
            if stop or done == run.total_steps or (settings.save_every is not None and done % settings.save_every == 0):
                run.save(done, identity)
            if stop and done < run.total_steps:
                raise run.stopped(done)
    return run.result(resumed_from)


def _batches(encoded: Sequence[Encoded], engine: Engine) -> Batches:
    learnable = [example for example in encoded if example.num_trained]
    if not learnable:
        raise DataError(
            f"none of {len(encoded)} training examples has a token to learn",
            where="train.data",
            remedy="raise train.max_length, so that prompts leave room for answers, or check the data",
        )
    settings = engine.settings
    return Batches(
        learnable,
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        seed=settings.seed,
        pad_id=settings.pad_id,
        pack_to=settings.max_length if settings.packing else None,
        rank=engine.rank,
        ranks=engine.ranks,
        flat=engine.flat,
    )


class _Run:
    """One call of `train`: the engine with its checkpoints, its metrics and its watcher."""

    def __init__(self, engine: Engine, *, total_steps: int, work_dir: Path, progress: ProgressSink) -> None:
        work_dir.mkdir(parents=True, exist_ok=True)
        self.engine = engine
        self.settings = engine.settings
        self.total_steps = total_steps
        self.checkpoints = work_dir / "checkpoints"
        self.log = MetricsLog(work_dir / "metrics.jsonl")
        self.progress = progress
        self.main = engine.rank == 0
        self.notes: list[str] = []
        self.wall_s = 0.0
        self._ahead: tuple[int, StepBatches] | None = None
        self.ranks_before = engine.ranks

    def resume(self, identity: str) -> int:
        """Restore the newest checkpoint and cut the metrics back to it; return the steps done, 0 for a new run."""
        if self.main:
            remove_drafts(self.checkpoints)
        self.engine.wait()  # the others must not read what the first rank is clearing away
        checkpoint = load_latest(self.checkpoints, identity=identity)
        done = checkpoint.state.step if checkpoint else 0
        if self.main:
            # without a checkpoint even the validation before the first step is measured again
            self.log.cut_after(done if checkpoint else -1)
        if checkpoint is not None:
            self.engine.restore(checkpoint.tensors, where=str(checkpoint.folder))
            self.wall_s = checkpoint.state.wall_s
            self.ranks_before = checkpoint.state.ranks or self.engine.ranks
        return done

    def announce(self, resumed_from: int, *, tokens: float) -> None:
        """Tell the watcher what is about to happen; `tokens` are a forward's on this rank."""
        if not self.main:
            return
        self.progress.start(self.total_steps)
        for reason in self.engine.reasons:
            self._note(reason)
        doubt = advice(tokens) if self.engine.precision.fp8 and self.engine.device.type == "cuda" else None
        if doubt is not None:
            self._note(doubt)
        if self.engine.ranks > 1:
            share = self.settings.batch_size // self.engine.ranks
            self._note(f"training on {self.engine.ranks} processes of {share} sequences each")
        if resumed_from:
            self._note(f"continued from the checkpoint at step {resumed_from} of {self.total_steps}")
        if self.ranks_before != self.engine.ranks:
            # examples, losses and gradients are those of the step, however many share it; only the order of additions differs
            self._note(
                f"continued with {self.engine.ranks} processes, started with {self.ranks_before}: the same to rounding, "
                "not to the bit"
            )

    def take_step(self, batches: Batches, index: int) -> None:
        """One optimizer step; what is not finite is refused before it touches the values."""
        started = time.monotonic()
        torch.manual_seed(stream_seed(self.settings.seed, "step", index, self.engine.rank))
        lr = learning_rate(
            index,
            total=self.total_steps,
            peak=self.settings.lr,
            schedule=self.settings.schedule,
            warmup=self.settings.warmup,
        )
        number, ready = self._ahead or (None, None)
        step = ready if ready is not None and number == index else batches.step(index)
        loss, norm, tokens = self.engine.gradient(step, meanwhile=lambda: self._prepare(batches, index + 1))
        while self.main and self.engine.notes:
            self._note(self.engine.notes.pop(0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(index + 1, loss=loss, norm=norm, lr=lr)
        self.engine.update(lr)
        seconds = time.monotonic() - started
        self.wall_s += seconds
        if self.main:
            metrics = StepMetrics(
                step=index + 1,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                tokens=tokens,
                tokens_per_s=round(tokens / seconds, 1),
                wall_s=round(self.wall_s, 3),
            )
            self.log.append(metrics)
            self.progress.step(metrics)

    def _prepare(self, batches: Batches, index: int) -> None:
        """Collate a step while the device works on the one before."""
        self._ahead = (index, batches.step(index)) if index < self.total_steps else None

    def validate(self, encoded: Sequence[Encoded], *, after: int = 0) -> None:
        """Score the held-out examples, if there are any and they are asked for."""
        if not encoded or self.settings.validate_every is None:
            return
        started = time.monotonic()
        loss = self.engine.mean_loss(encoded)
        self.wall_s += time.monotonic() - started
        if self.main:
            self.log.append(ValidationPoint(step=after, validation_loss=loss))
            self.progress.validation(after, loss)

    def save(self, done: int, identity: str) -> None:
        """Write a checkpoint on the first rank; the others wait for it."""
        if self.main:
            self.log.sync()
            state = CheckpointState(step=done, identity=identity, wall_s=self.wall_s, ranks=self.engine.ranks)
            save_checkpoint(self.checkpoints, state, tensors=self.engine.tensors())
        self.engine.wait()

    def stopped(self, done: int) -> Interrupted:
        """Return the error for a run that the user stopped."""
        return Interrupted(
            f"stopped after step {done} of {self.total_steps}; the state is saved",
            where=str(list_checkpoints(self.checkpoints)[-1]),
            remedy="run the same command again to continue",
        )

    def result(self, resumed_from: int) -> TrainResult:
        """Sum up the run from its metrics file, earlier sessions included."""
        self.engine.wait()
        history = read_metrics(self.log.path)
        return TrainResult(
            steps=self.total_steps,
            first_loss=history.steps[0].loss,
            last_loss=history.steps[-1].loss,
            validation=history.validation,
            tokens=sum(step.tokens for step in history.steps),
            wall_s=self.wall_s,
            resumed_from=resumed_from or None,
            peak_gib=self.engine.peak_gib(),
            precision=self.engine.precision.name,
            metrics_path=self.log.path,
            notes=tuple(self.notes),
        )

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.progress.note(text)

    def _not_finite(self, step: int, *, loss: float, norm: float, lr: float) -> NumericsError:
        kept = list_checkpoints(self.checkpoints)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        return NumericsError(
            f"not finite: loss {loss:.4g}, gradient norm {norm:.4g} at learning rate {lr:.2e}; {last}",
            where=f"train, step {step} of {self.total_steps}",
            remedy="lower train.lr, lengthen train.warmup, or set train.precision=fp32",
        )
