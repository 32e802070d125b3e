"""An adapter's folder: what must be in it, whose base it belongs to, and the card that says how to load it.

The sparse adapter's config has fields for the base's fingerprint and the sizes of its tensors. LoRA's config is peft's own, and
shall be readable by peft without us and without a warning; for it these things stand in `qwha_base.json` beside it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftConfig
from peft.utils.peft_types import PeftType
from safetensors import safe_open
from torch import nn

from qwha_cli.adapters.adapted_linear import adapted_layers
from qwha_cli.adapters.peft_bridge import METHOD
from qwha_cli.adapters.provenance import base_fingerprint
from qwha_cli.adapters.spectral.config import Sizes, SpectralConfig
from qwha_cli.adapters.spectral.model import spectral_layers
from qwha_cli.errors import ArtifactError
from qwha_cli.quant.swap import get_linear

BASE_FILE = "qwha_base.json"
_AGAIN = "run the stage that writes it again"
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_CARD = {
    "qwha": """
## Loading

peft and transformers know this adapter's method after one import; without it they stop at `KeyError: 'QWHA'`.

    import qwha_cli.integrations
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained("this folder")
""",
    "lora": f"""
## Loading

This is an ordinary LoRA, right on the quantized base that it was made for (`{BASE_FILE}` has its fingerprint) or on that base
dequantized, and wrong on the original model: it already holds part of what quantization lost. peft puts it on the quantized base
after one import:

    import qwha_cli.integrations
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained("this folder")
""",
}


@dataclass(frozen=True)
class LoraBase:
    """What `qwha_base.json` says.

    Attributes:
        base_fingerprint: SHA-256 of the quantized base the LoRA belongs to; None on a base without quantized layers.
        layers: Full names of the adapted modules.
    """

    base_fingerprint: str | None
    layers: tuple[str, ...]


def read_config(folder: Path) -> PeftConfig:
    """The configuration of an adapter of ours, sparse or LoRA.

    Raises:
        ArtifactError: A file is missing, or it is the adapter of another method, or a LoRA whose base is not known.
    """
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ArtifactError(f"no {' and no '.join(missing)}", where=str(folder), remedy=_AGAIN)
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, SpectralConfig) and config.peft_type != PeftType.LORA:
        method = f"{config.peft_type}".removeprefix("PeftType.")
        message = f"the adapter's method is {method}, not {METHOD.upper()} or LORA"
        raise ArtifactError(message, where=str(folder), remedy="load it with peft alone")
    if config.peft_type == PeftType.LORA and not (folder / BASE_FILE).is_file():
        message = f"there is no {BASE_FILE}, so it is not known which base this LoRA belongs to"
        raise ArtifactError(message, where=str(folder), remedy="load it with peft alone")
    return config


def read_base(folder: Path) -> LoraBase:
    """What is written beside a LoRA about its base.

    Raises:
        ArtifactError: The file cannot be read.
    """
    try:
        fields = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
        return LoraBase(fields["base_fingerprint"], tuple(fields["layers"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{BASE_FILE} cannot be read: {error}", where=str(folder), remedy=_AGAIN) from error


def check_tensors(folder: Path, config: PeftConfig, model: nn.Module) -> None:
    """Refuse a file that lacks a tensor or has one of another shape: peft only warns, and goes on with what it has made up.

    Args:
        folder: The adapter's folder.
        config: Its configuration.
        model: The base, without adapters.

    Raises:
        ArtifactError: It does; the message names layer and tensor.
    """
    with safe_open(folder / _FILES[1], framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        found = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    for (name, part), expected in _expected_tensors(folder, config, model).items():
        tensor = found.get(f"base_model.model.{name}.{part}")
        if tensor != expected:
            shown = "none" if tensor is None else f"{tensor[1]} of {tensor[0]}"
            raise ArtifactError(
                f"layer {name} should have {expected[1]} of {expected[0]} as {part}, the file has {shown}",
                where=str(folder),
                remedy=_AGAIN,
            )


def _expected_tensors(folder: Path, config: PeftConfig, model: nn.Module) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """(layer, tensor) to its number format as safetensors calls it, and shape."""
    expected: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    if isinstance(config, SpectralConfig):
        config.check_format()
        values = {"bfloat16": "BF16", "float32": "F32"}[config.store]
        for name in config.entries or {}:
            sizes = cast(Sizes, config.sizes_of(name))
            expected[name, "qwha_values"] = values, (sizes.entries,)
            expected[name, "qwha_gaps"] = "U8", (sizes.gap_bytes,)
        return expected
    assert isinstance(config, LoraConfig)
    for name in read_base(folder).layers:
        linear = get_linear(model, name)
        expected[name, "lora_A.weight"] = "F32", (config.r, linear.in_features)
        expected[name, "lora_B.weight"] = "F32", (linear.out_features, config.r)
    return expected


def check_places(model: nn.Module, folder: Path, *, adapter: str) -> None:
    """Refuse a place outside of its matrix: a wrong weight on a CPU, and the end of the process on a GPU.

    Args:
        model: With the adapter loaded.
        folder: Where it came from, for the message.
        adapter: Its name.

    Raises:
        ArtifactError: There is one.
    """
    for name, layer in spectral_layers(model).items():
        try:
            layer.rows(adapter)
        except ArtifactError as error:
            raise ArtifactError(f"layer {name}: {error.message}", where=str(folder), remedy=_AGAIN) from error


def complete(folder: Path, config: PeftConfig, model: nn.Module, *, fingerprint: str | None = None) -> None:
    """Add to what peft wrote: the base of a LoRA, and to the card how the adapter is loaded.

    Args:
        folder: The adapter's folder.
        config: Its configuration.
        model: The model it was taken from.
        fingerprint: The base's, where it is known; None to compute it.
    """
    sparse = isinstance(config, SpectralConfig)
    if not sparse:
        base = LoraBase(fingerprint or base_fingerprint(model), tuple(sorted(adapted_layers(model))))
        (folder / BASE_FILE).write_text(json.dumps(asdict(base), indent=2) + "\n", encoding="utf-8")
    card = folder / "README.md"
    written, loading = card.read_text(encoding="utf-8"), _CARD["qwha" if sparse else "lora"]
    if loading.strip() not in written:
        card.write_text(written + loading, encoding="utf-8")
