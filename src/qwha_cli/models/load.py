"""Loading the model that a recipe names, on the CPU, with its tokenizer and a fingerprint of its weights.

    meta-llama/Llama-3.2-3B      the Hugging Face hub (safetensors only), or its local cache
    ./models/my-llama            a folder with config.json, safetensors and tokenizer
    ./model.Q4_1.gguf            a GGUF file, dequantized once (`builtin.py`)
    builtin:smollm2-135m         a model that an installed Python package carries
    random:tiny-llama            random weights from a configuration (`random.py`)

Code that comes with a model is never run. Nothing here quantizes; a checkpoint that is quantized already is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from qwha_cli.errors import ModelError
from qwha_cli.models import builtin, hub, random
from qwha_cli.models.targets import SUPPORTED, find_targets

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SAMPLED_ABOVE = 1 << 30
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use.

    Attributes:
        model: On the CPU, in eval mode.
        tokenizer: Its tokenizer, with a pad token (the end token where it had none).
        source: Where it came from, for people: id and commit, folder, file or configuration.
        fingerprint: sha256 that changes with the weights; of the commit for a model of the hub.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str


@dataclass(frozen=True)
class Place:
    """A model's folder on this machine, where it came from, and a fingerprint of its weights.

    Attributes:
        folder: Where its files are.
        source: Where they came from, for people.
        commit: Of a hub model; it says what the weights are.
    """

    folder: Path
    source: str
    commit: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 that changes with the weights; of a local folder it reads the files, which takes its time."""
        if self.commit is not None:
            return hashlib.sha256(self.source.encode()).hexdigest()
        return builtin.source_digest(self.folder) or _folder_digest(self.folder)


def load(model_id: str, *, revision: str | None = None, dtype: torch.dtype | None, seed: int = 0) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        model_id: As in the table above.
        revision: Branch, tag or commit of a hub model.
        dtype: Of the weights; None for the checkpoint's own.
        seed: Of the weights of a `random:` model.

    Raises:
        ModelError: No such model, out of reach, gated, incomplete, corrupted, quantized already, or an architecture without
            linear layers in its blocks.
        ResourceError: The cache for converted models cannot be written.
    """
    if model_id.startswith("random:"):
        name = model_id.removeprefix("random:")
        model = random.random_model(name, dtype=dtype, seed=seed)
        config = model.config.to_json_string(use_diff=False)
        fingerprint = hashlib.sha256(f"{config}|{seed}|{model.dtype}".encode()).hexdigest()
        tokenizer: PreTrainedTokenizerBase = random.byte_tokenizer()
        source = f"{model_id} (seed {seed})"
    else:
        place = resolve(model_id, revision)
        model, tokenizer = _load_folder(place.folder, model_id, dtype), load_tokenizer(place.folder)
        source, fingerprint = place.source, place.fingerprint
    find_targets(model)  # an architecture that nothing can be done with is refused now, not after an hour of calibration
    return LoadedModel(model.eval(), tokenizer, source, fingerprint)


def describe(model_id: str, *, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model, without its weights (a hub model's weights are not downloaded).

    Raises:
        ModelError: As `load`, as far as the configuration tells.
    """
    if model_id.startswith("random:"):
        return random.random_config(model_id.removeprefix("random:"))
    local = _local_folder(model_id)
    folder = local if local is not None else hub.snapshot(model_id, revision=revision, weights=False).folder
    return read_config(folder, model_id)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder; one without a pad token gets the end token as such.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    except Exception as error:
        # a missing or broken tokenizer shows as OSError, ValueError, TypeError or an exception of the Rust library
        raise ModelError(
            f"no usable tokenizer in this folder: {_first_line(error)}",
            where=str(folder),
            remedy="put the model's tokenizer.json and tokenizer_config.json beside its config.json",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve(model_id: str, revision: str | None) -> Place:
    """The folder of a model that has files; a hub model is downloaded, a GGUF converted, where that was not done before.

    Raises:
        ModelError: As `load`.
        ResourceError: The cache for converted models cannot be written.
    """
    local = _local_folder(model_id)
    if local is not None:
        return Place(local, model_id if ":" in model_id else str(Path(model_id).expanduser().resolve()))
    found = hub.snapshot(model_id, revision=revision, weights=True)
    return Place(found.folder, f"{model_id}@{found.commit}", found.commit)


def _local_folder(model_id: str) -> Path | None:
    """The folder on this machine that an id means; None when it is an id of the hub."""
    if model_id.startswith("builtin:"):
        with _no_progress_bars():
            return builtin.converted(builtin.find_builtin(model_id.removeprefix("builtin:")))
    path = Path(model_id).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        with _no_progress_bars():
            return builtin.converted(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                "no config.json in this folder", where=model_id, remedy="name the folder that holds config.json and *.safetensors"
            )
        return path
    if path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1 or path.suffix == ".gguf":
        raise ModelError("no such file or folder", where=model_id, remedy="correct model.id")
    return None


def read_config(folder: Path, model_id: str) -> PretrainedConfig:
    """The configuration in a folder of a model that is not quantized yet.

    Raises:
        ModelError: transformers does not know it, or the model is quantized already.
    """
    from transformers import AutoConfig

    try:
        config = cast("PretrainedConfig", AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))
    except Exception as error:
        # an unknown model_type, a repository that wants its own code run, JSON that is none
        remedy = f"use a supported model: {SUPPORTED}"
        raise ModelError(
            f"transformers cannot read its config.json: {_first_line(error)}", where=model_id, remedy=remedy
        ) from error
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
        raise ModelError(
            f"this checkpoint is quantized already ({method})", where=model_id, remedy="name the 16-bit model that it was made of"
        )
    return config


def _load_folder(folder: Path, model_id: str, dtype: torch.dtype | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    read_config(folder, model_id)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            "no *.safetensors in this folder", where=model_id, remedy="convert the weights to safetensors; pickles are not read"
        )
    try:
        with _no_progress_bars():
            loaded = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype if dtype is not None else "auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        # corrupted files raise SafetensorError, OSError or RuntimeError; an encoder or a vision model ValueError
        raise ModelError(
            f"cannot load the model: {_first_line(error)}",
            where=model_id,
            remedy=f"check that its files are complete and that it is a decoder: {SUPPORTED}",
        ) from error
    model, info = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would go on with random weights in their place
        raise ModelError(
            f"{len(missing)} tensors are missing from its files, the first {missing[0]}",
            where=model_id,
            remedy="download it again",
        )
    return model


def _folder_digest(folder: Path) -> str:
    """sha256 over config.json and the weight files; of files above 1 GiB only size and 64 evenly spread MiB are read."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        size = file.stat().st_size
        digest.update(f"{file.name}|{size}|".encode())
        with file.open("rb") as stream:
            if size <= _SAMPLED_ABOVE:
                while chunk := stream.read(_SAMPLE):
                    digest.update(chunk)
                continue
            for part in range(64):
                stream.seek(part * (size - _SAMPLE) // 63)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


@contextmanager
def _no_progress_bars() -> Generator[None]:
    """Loading bars of transformers would run through our own display."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
