"""An adapter's folder: what must be in it, whose base it belongs to, and the card that says how to load it.

The sparse adapter's config has fields for the base's fingerprint and the sizes of its tensors. LoRA's config is peft's own, and
shall be readable by peft without us and without a warning; for it these things stand in `qwha_base.json` beside it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils.peft_types import PeftType
from safetensors import safe_open
from torch import nn

from qwha_cli.adapters.adapted_linear import adapted_layers
from qwha_cli.adapters.peft_bridge import METHOD
from qwha_cli.adapters.provenance import base_fingerprint
from qwha_cli.adapters.spectral.config import SpectralConfig
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
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    for (name, part), shape in _expected_shapes(folder, config, model).items():
        actual = found.get(f"base_model.model.{name}.{part}")
        if actual != shape:
            what = f"{shape[0]} entries" if len(shape) == 1 else f"a tensor {shape}"
            raise ArtifactError(
                f"layer {name} should have {what}, {part} in the file has {'none' if actual is None else actual}",
                where=str(folder),
                remedy=_AGAIN,
            )


def _expected_shapes(folder: Path, config: PeftConfig, model: nn.Module) -> dict[tuple[str, str], tuple[int, ...]]:
    """(layer, tensor) to shape."""
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    if isinstance(config, SpectralConfig):
        for name, count in (config.entries or {}).items():
            shapes |= {(name, part): (count,) for part in ("qwha_values", "qwha_columns")}
        return shapes
    assert isinstance(config, LoraConfig)
    for name in read_base(folder).layers:
        linear = get_linear(model, name)
        shapes[name, "lora_A.weight"] = (config.r, linear.in_features)
        shapes[name, "lora_B.weight"] = (linear.out_features, config.r)
    return shapes


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
        rows = layer.rows(adapter)
        starts, columns = rows.row_starts.long(), rows.columns.long()
        sound = starts[0] == 0 and starts[-1] == len(columns) and bool((starts.diff() >= 0).all())
        inside = len(columns) == 0 or (columns.min() >= 0 and columns.max() < layer.in_features)
        if not (sound and inside):
            raise ArtifactError(f"layer {name} has places outside of its matrix", where=str(folder), remedy=_AGAIN)


def complete(folder: Path, config: PeftConfig, model: nn.Module) -> None:
    """Add to what peft wrote: the base of a LoRA, and to the card how the adapter is loaded.

    Args:
        folder: The adapter's folder.
        config: Its configuration.
        model: The model it was taken from.
    """
    sparse = isinstance(config, SpectralConfig)
    if not sparse:
        base = LoraBase(base_fingerprint(model), tuple(sorted(adapted_layers(model))))
        (folder / BASE_FILE).write_text(json.dumps(asdict(base), indent=2) + "\n", encoding="utf-8")
    card = folder / "README.md"
    written, loading = card.read_text(encoding="utf-8"), _CARD["qwha" if sparse else "lora"]
    if loading.strip() not in written:
        card.write_text(written + loading, encoding="utf-8")
