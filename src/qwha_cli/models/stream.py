"""Opening a model without reading its weights: what quantize and init do, so that its size need not fit into memory.

The skeleton has every module of the architecture, its parameters on the meta device; `weights.fill` reads what is wanted. Where
the files name their tensors otherwise than the architecture does (transformers then renames them while loading), or where there
are no files (`random:` models), the model is loaded whole, which `resident` tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor

from qwha_cli.errors import ModelError
from qwha_cli.kernels.wht import wht
from qwha_cli.models.load import load, load_tokenizer, read_config, resolve
from qwha_cli.models.targets import SUPPORTED, find_targets
from qwha_cli.models.weights import FileWeights, MemoryWeights, Weights
from qwha_cli.quant.checkpoint import check_config, tied_names
from qwha_cli.quant.packed import Basis
from qwha_cli.quant.transformers_plugin import QwhaQuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenModel:
    """A model to be walked through.

    Attributes:
        model: In eval mode; its parameters are on the meta device, or all in memory if `resident`.
        weights: Where its tensors are read.
        tokenizer: Its tokenizer.
        source: Where it came from, for people.
        resident: Whether the whole model lies in memory.
        identify: Gives the fingerprint; may have to read all weights.
    """

    model: PreTrainedModel
    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    source: str
    resident: bool
    identify: Callable[[], str]

    @property
    def fingerprint(self) -> str:
        """The sha256 that changes with the weights."""
        return self.identify()

    def weight(self, layer: str) -> Tensor:
        """A linear layer's weight (out, in), on the CPU, as stored; not to be written to."""
        return self.weights.read(f"{layer}.weight")

    def weight_in(self, basis: Basis, layer: str, *, device: torch.device) -> Tensor:
        """A linear layer's weight in a basis: float32 (out, in) on a device, W or W H; not to be written to."""
        weight = self.weight(layer).to(device=device, dtype=torch.float32)
        return wht(weight) if basis == "hadamard" else weight

    @property
    def in_files(self) -> Weights | None:
        """Where a skeleton's weights are read; None for a model in memory."""
        return None if self.resident else self.weights

    def shape(self, layer: str) -> tuple[int, int]:
        """A linear layer's (out, in)."""
        return cast("tuple[int, int]", tuple(self.model.get_parameter(f"{layer}.weight").shape))

    def num_parameters(self) -> int:
        """How many parameters the model has; tied ones once, also after a walk, which reads each name by itself."""
        tied = tied_names(self.model)
        return sum(p.numel() for name, p in self.model.named_parameters(remove_duplicate=False) if name not in tied)


def open_model(model_id: str, *, revision: str | None = None, dtype: torch.dtype | None, seed: int = 0) -> OpenModel:
    """Open a model for a walk.

    Args:
        model_id: As for `load`.
        revision: Branch, tag or commit of a hub model.
        dtype: Of weights held in memory; None for the checkpoint's own. Weights in files keep theirs.
        seed: Of the weights of a `random:` model.

    Raises:
        ModelError: As `load`.
        ResourceError: The cache for converted models cannot be written.
    """
    from transformers import GenerationConfig

    if not model_id.startswith("random:"):
        place = resolve(model_id, revision)
        config = read_config(place.folder, model_id)
        skeleton = make_skeleton(config, model_id)
        aliases = tied_names(skeleton)
        weights = FileWeights(place.folder, aliases=aliases)
        if {*dict(skeleton.named_parameters())} <= weights.names():
            find_targets(skeleton)  # an architecture that nothing can be done with is refused now
            if (place.folder / "generation_config.json").is_file():
                skeleton.generation_config = GenerationConfig.from_pretrained(place.folder)
            tokenizer = load_tokenizer(place.folder)
            return OpenModel(skeleton, weights, tokenizer, place.source, resident=False, identify=lambda: place.fingerprint)
    loaded = load(model_id, revision=revision, dtype=dtype, seed=seed)
    weights = MemoryWeights(loaded.model)
    return OpenModel(loaded.model, weights, loaded.tokenizer, loaded.source, resident=True, identify=lambda: loaded.fingerprint)


def open_base(folder: Path) -> OpenModel:
    """Open a folder written by the quantize stage for a walk: its quantized layers are there, their codes still in the files.

    Raises:
        ArtifactError: The folder is missing, not ours, or made with other Hadamard matrices.
        ModelError: Its files cannot be read.
    """
    from transformers import AutoConfig

    check_config(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    described = QwhaQuantizationConfig(**config.quantization_config)
    described.check_hadamard()
    skeleton = make_skeleton(config, folder)
    described.prepare(skeleton)
    weights = FileWeights(folder, aliases=tied_names(skeleton))
    digest = str(described.fingerprint)
    return OpenModel(skeleton, weights, load_tokenizer(folder), str(folder), resident=False, identify=lambda: digest)


def make_skeleton(config: PretrainedConfig, where: Path | str) -> PreTrainedModel:
    """A causal language model in eval mode whose parameters are on the meta device; its buffers are real.

    Raises:
        ModelError: The configuration is none of a decoder.
    """
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
    except ValueError as error:
        raise ModelError(str(error).splitlines()[0], where=str(where), remedy=f"use a supported model: {SUPPORTED}") from error
    skeleton = cast("PreTrainedModel", model)
    skeleton.tie_weights()
    return skeleton.eval()
