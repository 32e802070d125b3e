"""The train stage: the adapter's values are trained on the recipe's data; everything else stays frozen.

Checkpoints live in the run's work folder until the artifact is published, so a killed run continues where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from qwha_cli import catalog
from qwha_cli.adapters.build import load_adapter, save_adapter, set_backend
from qwha_cli.adapters.keep import choose_keep, set_keep
from qwha_cli.data.example import Example
from qwha_cli.data.split import train_validation
from qwha_cli.data.tokenize import Encoded, encode
from qwha_cli.errors import DataError
from qwha_cli.models.load import load_tokenizer
from qwha_cli.models.targets import decoder_blocks
from qwha_cli.quant.checkpoint import load_base
from qwha_cli.recipe.schema import Recipe
from qwha_cli.recipe.train_section import AnswersSection, TrainDataSection
from qwha_cli.report.plots import loss_curve
from qwha_cli.stages.context import StageContext
from qwha_cli.stages.plan import FOLDERS
from qwha_cli.stages.ranks import own_ranks
from qwha_cli.training.loop import TrainSettings, train
from qwha_cli.training.precision import choose_precision


def run(context: StageContext) -> dict[str, object]:
    """Train the initialised adapter and write it as a peft folder with metrics.jsonl and loss.png; return the summary."""
    recipe = context.recipe
    settings = recipe.train
    quantized = context.inputs["init"].parent / FOLDERS["quantize"]
    tokenizer = load_tokenizer(quantized)
    examples = read_examples(recipe.train.data, recipe=recipe, tokenizer=tokenizer)
    size = settings.validation.examples if settings.validation else 0
    kept, held = train_validation(examples, size=size, seed=recipe.seed)
    encoded = _encode(context, kept, tokenizer)
    validation = _encode(context, held, tokenizer)
    base = load_base(quantized, dtype=context.dtype)
    model = load_adapter(base, context.inputs["init"], trainable=True)
    shard = _shard_on(context)
    if shard is None:
        model.to(context.device)
    device = shard or context.device
    dtype = choose_precision(settings.precision, device=device).autocast or context.dtype
    split = shard is not None
    # a split base is recomputed whatever the recipe says
    blocks = [block for _, block in decoder_blocks(model)] if settings.checkpointing or split else []
    kept_weights = choose_keep(settings.keep, model, dtype=dtype, device=device, recomputed=blocks, split=split)
    set_keep(model, kept_weights.keep)
    if device.type == "cuda" or settings.keep not in ("auto", kept_weights.keep):
        context.note(kept_weights.reason)
    for sentence in set_backend(model, settings.backend, dtype=dtype, device=device):
        context.note(sentence)
    outcome = train(
        model,
        encoded,
        encoded_validation=validation,
        settings=_settings(recipe, cast(int, tokenizer.pad_token_id), shard=shard),
        work_dir=context.work,
        identity=context.key,
        progress=context.events.training(),
        interrupted=context.interrupted,
    )
    if context.rank:
        return {}  # rank 0 writes, and deletes the work folder when it has published
    save_adapter(model, context.draft, base=str(quantized))
    shutil.copyfile(outcome.metrics_path, context.draft / "metrics.jsonl")
    loss_curve(context.draft / "metrics.jsonl", context.draft / "loss.png")
    context.notes.extend(outcome.notes)  # the watcher has heard them already
    return outcome.summary() | {"examples": len(kept), "validation_examples": len(held)}


def read_examples(
    data: TrainDataSection | AnswersSection, *, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Read the examples of a data section (`train.data` or `eval.answers`)."""
    read = cast(Callable[..., list[Example]], catalog.load(catalog.DATASETS[data.format]))
    return read(data.path, split=data.split, seed=recipe.seed, limit=data.limit, tokenizer=tokenizer)


def _encode(context: StageContext, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    settings = context.recipe.train
    encoded = [encode(e, tokenizer, max_length=settings.max_length, mask_prompt=settings.data.mask_prompt) for e in examples]
    kept = [e for e in encoded if any(label != -100 for label in e.labels)]
    if examples and not kept:
        raise DataError(f"no answer fits into {settings.max_length} tokens", where="train.data", remedy="raise train.max_length")
    if len(kept) < len(encoded):
        context.note(
            f"{len(encoded) - len(kept)} of {len(encoded)} examples left out: no answer within {settings.max_length} tokens"
        )
    return kept


def _shard_on(context: StageContext) -> torch.device | None:
    """Where the packed base is split over the processes, if they were started so."""
    ranks = own_ranks()
    if not ranks.shard or ranks.size == 1:
        return None
    context.note("the packed base is split over the processes, and every block gathered for its turn")
    if not context.recipe.train.checkpointing:
        context.note("train.checkpointing is on, as a split base needs it")
    return context.device


def _settings(recipe: Recipe, pad_id: int, *, shard: torch.device | None) -> TrainSettings:
    t = recipe.train
    return TrainSettings(
        seed=recipe.seed,
        epochs=t.epochs,
        steps=t.steps,
        batch_size=t.batch_size,
        accumulation=t.accumulation,
        max_length=t.max_length,
        packing=t.packing,
        lr=t.lr,
        schedule=t.schedule,
        warmup=t.warmup,
        weight_decay=t.weight_decay,
        clip=t.clip,
        optimizer=t.optimizer,
        precision=t.precision,
        kernels=t.kernels,
        attention=t.attention,
        launch=t.launch,
        checkpointing=t.checkpointing or shard is not None,
        shard_on=shard,
        save_every=t.save_every,
        validate_every=t.validation.every if t.validation else None,
        pad_id=pad_id,
    )
