"""What an adapter is, as peft stores it in adapter_config.json.

The size of every layer's tensors is part of it (`entries`, `gap_bytes`): peft and transformers build the modules before they open
the tensor file and compare shapes one by one, so the sizes must be known by then. The identity of the frozen base and of the
Hadamard matrices is part of it too, because the same numbers on another base or in another basis are silently wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from peft import PeftConfig

from qwha_cli.adapters.peft_bridge import peft_type
from qwha_cli.errors import ArtifactError, UsageError
from qwha_cli.kernels.effective_weight import Transform

Store = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Sizes:
    """How long a layer's tensors in a file are: entries of F, and bytes of the stream that tells their places."""

    entries: int
    gap_bytes: int


def store_dtype(store: Store) -> torch.dtype:
    """The number format that values have in a file."""
    return torch.bfloat16 if store == "bfloat16" else torch.float32


@dataclass
class SpectralConfig(PeftConfig):
    """Configuration of the adapter W' = W + scale · F Hᵀ with a sparse F (out, in) whose values are trained.

    Args:
        rank: A fresh adapter gets rank · (in + out) entries a layer, as many parameters as LoRA of that rank.
        scale: Factor α on F.
        target_modules: Names, suffixes or a regular expression as everywhere in peft; "all-linear" (the default) means every
            nn.Linear and QuantizedLinear but the output head.
        exclude_modules: Names, suffixes or a regular expression to leave out.
        transform: "wht" multiplies by the orthonormal Hadamard matrix on the input side; "identity" leaves F in weight space.
        store: Number format of the values in the file; in memory they are float32. "bfloat16" rounds what was trained when it is
            saved, "float32" loses nothing.
        seed: Places of a fresh adapter are drawn with it.
        layers_to_transform: Only the layers with these indices.
        layers_pattern: Name of the list that these indices count in.
        modules_to_save: Other modules to train whole and save, as everywhere in peft.
        entries: Number of entries by full module name, filled in when an adapter is assigned or saved.
        gap_bytes: Length of the places' stream by full module name, likewise.
        base_fingerprint: SHA-256 of the quantized base it belongs to; None on a base without quantized layers.
        hadamard_digest: Digest of H by size (as text); what was trained in one H means nothing in another.

    Raises:
        UsageError: A rank below 1, a scale that is not finite, or an unknown transform or number format.
    """

    rank: int = 64
    scale: float = 1.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    transform: Transform = "wht"
    store: Store = "bfloat16"
    seed: int = 0
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    entries: dict[str, int] | None = None
    gap_bytes: dict[str, int] | None = None
    base_fingerprint: str | None = None
    hadamard_digest: dict[str, str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        # peft looks names up in them, and writes sets back as lists
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check()

    def _check(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank {self.rank} is not a positive number", where="SpectralConfig.rank", remedy="use 1 or more")
        if not math.isfinite(self.scale):
            raise UsageError(f"scale {self.scale} is not finite", where="SpectralConfig.scale", remedy="use 1.0, the usual value")
        choices = {"transform": (self.transform, get_args(Transform)), "store": (self.store, get_args(Store))}
        for key, (value, known) in choices.items():
            if value not in known:
                message = f"there is no {key} {value!r}"
                raise UsageError(message, where=f"SpectralConfig.{key}", remedy=f"use {' or '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary; sets become sorted lists, so that the same adapter always writes the same file."""
        fields: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    def sizes_of(self, name: str) -> Sizes | None:
        """The sizes of what is stored for a module, or None when the adapter is fresh.

        Args:
            name: Full module name. One side may lack leading parts: transformers' headless models drop "model.".
        """
        entries, gap_bytes = self.entries or {}, self.gap_bytes or {}
        found = name if name in entries else next((stored for stored in entries if _same_end(stored, name)), None)
        return None if found is None else Sizes(entries[found], gap_bytes[found])

    def check_format(self) -> None:
        """Refuse the config of a file in which places are stored in another way.

        Raises:
            ArtifactError: It says how many entries each layer has and not how long their places' stream is, as versions before
                the byte-wise gaps did, or names other layers for the two.
        """
        if (self.entries or {}).keys() != (self.gap_bytes or {}).keys():
            raise ArtifactError(
                "the adapter has the format of an earlier version: entries without gap_bytes for each layer",
                where="adapter_config.json",
                remedy="make it again with this version (qwha init, qwha train), or load it with the version that made it",
            )


def _same_end(one: str, other: str) -> bool:
    return one.endswith(f".{other}") or other.endswith(f".{one}")
