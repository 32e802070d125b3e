"""What quantize and init do alike: open the 16-bit model, read the calibration text, walk through the blocks, keep what is done.

The text is weighted by what the loss minds, see models/sensitivity.py: measured once, by quantize, and kept in its folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qwha_cli.artifacts.blocks import FinishedBlocks
from qwha_cli.artifacts.tensors import read_tensors, write_tensors
from qwha_cli.data.calibration import calibration_tokens
from qwha_cli.errors import ArtifactError
from qwha_cli.kernels.hadamard import plan as hadamard_plan
from qwha_cli.models.load import LoadedModel, load
from qwha_cli.models.sensitivity import Sensitivity, measure_sensitivity
from qwha_cli.models.stream import OpenModel, open_model
from qwha_cli.models.targets import Target, decoder_blocks
from qwha_cli.models.walk import Block, Original, walk
from qwha_cli.stages.context import StageContext

# beside the model's own files: they would be taken for weights
_SENSITIVITY = Path("calibration") / "sensitivity.safetensors"


def finished_blocks(context: StageContext) -> FinishedBlocks:
    """What an earlier run of this stage finished, with a note if there is something."""
    finished = FinishedBlocks(context.work)
    if count := finished.count():
        context.note(f"continued behind {count} blocks that an earlier run of this stage had finished")
    return finished


def open_original(context: StageContext) -> OpenModel:
    """Open the recipe's 16-bit model for a walk."""
    model = context.recipe.model
    context.progress(0, 1, f"opening {model.id}")
    # In the checkpoint's own format, so that what is not quantized is stored as it was; the walk computes in the context's.
    dtype = None if model.dtype == "auto" else context.dtype
    return open_model(model.id, revision=model.revision, dtype=dtype, seed=context.recipe.seed)


def walk_through(context: StageContext, opened: OpenModel, tokens: Tensor, *, original: OpenModel | None) -> Iterator[Block]:
    """Walk through an opened model, on the context's device, the 16-bit model beside it if given."""
    batch_size = context.recipe.quantize.calibration.batch_size
    return walk(
        opened.model,
        tokens,
        device=context.device,
        batch_size=batch_size,
        dtype=context.dtype,
        weights=opened.in_files,
        original=None if original is None else Original(original.model, original.in_files),
    )


def load_original(context: StageContext, *, dtype: torch.dtype | None) -> LoadedModel:
    """Load the recipe's 16-bit model whole, on the CPU, in a number format; None for the checkpoint's own."""
    model = context.recipe.model
    context.progress(0, 1, f"loading {model.id}")
    return load(model.id, revision=model.revision, dtype=dtype, seed=context.recipe.seed)


def by_block(model: nn.Module, targets: list[Target]) -> dict[int, list[Target]]:
    """Targets by the number of their block, with every block that the model has."""
    found: dict[int, list[Target]] = {index: [] for index in range(len(decoder_blocks(model)))}
    for target in targets:
        found[target.block].append(target)
    return found


def calibration(context: StageContext, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the recipe's calibration tokens, int64 (samples, length)."""
    settings = context.recipe.quantize.calibration
    return calibration_tokens(
        data=settings.data,
        path=settings.path,
        split=settings.split,
        samples=settings.samples,
        length=settings.length,
        seed=context.recipe.seed,
        tokenizer=tokenizer,
    )


def measured_sensitivity(context: StageContext, opened: OpenModel, tokens: Tensor) -> Sensitivity | None:
    """What the loss minds, for the recipes that want it; measured, or found where a killed run left it."""
    settings = context.recipe.quantize.calibration
    if settings.weighting == "none":
        return None
    kept = context.work / "sensitivity.safetensors"
    if not kept.is_file():
        found = measure_sensitivity(
            opened.model,
            tokens,
            device=context.device,
            batch_size=settings.batch_size,
            dtype=context.dtype,
            weights=opened.in_files,
            progress=lambda done, total: context.progress(done, total, "measuring what the loss minds"),
        )
        write_tensors(kept, found.to_tensors())
    place = context.draft / _SENSITIVITY
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(kept, place)
    # as it comes back from the file, so that a run that was stopped gives the same
    return Sensitivity.from_tensors(read_tensors(kept))


def kept_sensitivity(context: StageContext) -> Sensitivity | None:
    """What the quantize stage measured."""
    if context.recipe.quantize.calibration.weighting == "none":
        return None
    path = context.inputs["quantize"] / _SENSITIVITY
    if not path.is_file():
        remedy = "quantize the model again with `qwha quantize RECIPE --force`"
        raise ArtifactError(f"there is no {_SENSITIVITY}", where=str(context.inputs["quantize"]), remedy=remedy)
    return Sensitivity.from_tensors(read_tensors(path))


def note_blocks(context: StageContext, size: int) -> None:
    """Say so where a transform is block-diagonal because no Hadamard matrix of its whole size is known."""
    shape = hadamard_plan(size)
    if not shape.exact:
        context.note(f"no Hadamard matrix of order {size} is known here: {size // shape.block} blocks of {shape.block}")


def note_devices(context: StageContext) -> None:
    """Say so where a block's matrices are shared out to several devices."""
    if len(context.devices) > 1:
        context.note(f"each block's matrices shared out to {', '.join(str(device) for device in context.devices)}")
