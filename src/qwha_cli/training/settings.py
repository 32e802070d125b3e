"""How to train, and what a finished training says of itself: the two values that cross the border of `train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qwha_cli.models.liger import Kernels
from qwha_cli.models.varlen import Attention
from qwha_cli.training.metrics import ValidationPoint
from qwha_cli.training.optim import OptimizerName, Schedule
from qwha_cli.training.precision import Precision
from qwha_cli.training.step_graphs import Launch


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the fields are the recipe's `train` keys.

    Attributes:
        lr: Peak learning rate.
        pad_id: Token that fills up batches.
        seed: Of the data order and of every random stream.
        epochs: Passes over the data, may be a fraction. Exactly one of this and `steps`.
        steps: Optimizer steps.
        batch_size: Sequences a forward, over all ranks together.
        accumulation: Forwards an optimizer step.
        max_length: Tokens a row when packing; the encoder has already cut the examples.
        packing: Several examples in one row, isolated from one another.
        schedule: What follows the warm-up.
        warmup: Below 1 a share of all steps, else a number of steps.
        weight_decay: AdamW's, decoupled.
        clip: Largest gradient norm; None for no clipping.
        optimizer: Whose moments are float32 or of 8 bits.
        precision: Arithmetic of the forward and backward passes.
        kernels: Whose norms, activations, rotations and loss.
        attention: Over sequences end to end without padding (`varlen`), or side by side (`padded`).
        launch: Whether passes are recorded and replayed (`graph`), or their kernels launched one by one (`eager`).
        checkpointing: Recompute activations in the backward pass instead of keeping them.
        save_every: Steps between checkpoints; None saves only at the end.
        validate_every: Steps between validations, which also happen before the first and after the last step; None for none.
        shard_on: Split the packed base over the ranks, which compute on devices of this kind; needs checkpointing. None to have
            it whole on each.
    """

    lr: float
    pad_id: int
    seed: int = 0
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    max_length: int = 512
    packing: bool = False
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float | None = 1.0
    optimizer: OptimizerName = "adamw"
    precision: Precision = "auto"
    kernels: Kernels = "auto"
    attention: Attention = "auto"
    launch: Launch = "auto"
    checkpointing: bool = False
    save_every: int | None = 50
    validate_every: int | None = None
    shard_on: torch.device | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a finished training says of itself, earlier sessions of a resumed run included.

    Attributes:
        steps: Optimizer steps.
        first_loss: Of the first step, nats a token.
        last_loss: Of the last step.
        validation: Every validation.
        tokens: Tokens read, prompts included, padding not.
        wall_s: Seconds in steps and validations.
        resumed_from: The step this session began at, or None.
        peak_gib: Most memory held: of the device on CUDA, else resident memory of the process.
        precision: "bf16", "fp8" or "fp32".
        metrics_path: The metrics.jsonl.
        notes: What the watcher was told.
    """

    steps: int
    first_loss: float
    last_loss: float
    validation: tuple[ValidationPoint, ...]
    tokens: int
    wall_s: float
    resumed_from: int | None
    peak_gib: float
    precision: str
    metrics_path: Path
    notes: tuple[str, ...]

    def summary(self) -> dict[str, object]:
        """The numbers for a manifest, JSON-able."""
        return {
            "steps": self.steps,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "first_validation_loss": self.validation[0].validation_loss if self.validation else None,
            "last_validation_loss": self.validation[-1].validation_loss if self.validation else None,
            "tokens": self.tokens,
            "train_wall_s": round(self.wall_s, 3),
            "resumed_from": self.resumed_from,
            "peak_gib": round(self.peak_gib, 3),
            "precision": self.precision,
        }
