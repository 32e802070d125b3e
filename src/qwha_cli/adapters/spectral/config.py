"""What an adapter is, as peft stores it in adapter_config.json.

The size of every layer's tensors is part of it (`entries`): peft and transformers build the modules before they open the tensor
file and compare shapes one by one, so the counts must be known by then. The identity of the frozen base and of the Hadamard
matrices is part of it too, because the same numbers on another base or in another basis are silently wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from qwha_cli.adapters.peft_bridge import peft_type
from qwha_cli.errors import UsageError
from qwha_cli.kernels.effective_weight import Transform


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
        seed: Places of a fresh adapter are drawn with it.
        layers_to_transform: Only the layers with these indices.
        layers_pattern: Name of the list that these indices count in.
        modules_to_save: Other modules to train whole and save, as everywhere in peft.
        entries: Number of entries by full module name, filled in when an adapter is assigned or saved.
        base_fingerprint: SHA-256 of the quantized base it belongs to; None on a base without quantized layers.
        hadamard_digest: Digest of H by size (as text); what was trained in one H means nothing in another.

    Raises:
        UsageError: A rank below 1, a scale that is not finite, or an unknown transform.
    """

    rank: int = 64
    scale: float = 1.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    transform: Transform = "wht"
    seed: int = 0
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    entries: dict[str, int] | None = None
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
        if self.transform not in ("wht", "identity"):
            raise UsageError(
                f"there is no transform {self.transform!r}", where="SpectralConfig.transform", remedy="use wht or identity"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary; sets become sorted lists, so that the same adapter always writes the same file."""
        fields: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    def entries_of(self, name: str) -> int | None:
        """The number of entries stored for a module, or None when the adapter is fresh.

        Args:
            name: Full module name. One side may lack leading parts: transformers' headless models drop "model.".
        """
        entries = self.entries or {}
        if name in entries:
            return entries[name]
        for stored, count in entries.items():
            if stored.endswith(f".{name}") or name.endswith(f".{stored}"):
                return count
        return None
