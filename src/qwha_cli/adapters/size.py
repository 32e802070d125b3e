"""What an adapter costs in bits, counted on what was written and not on what was meant to be."""

from __future__ import annotations

from pathlib import Path

_LENGTH = 8  # a safetensors file begins with its header's length, 64 bits little-endian


def stored_bits(folder: Path) -> int:
    """All bits of an adapter's tensors, values and places, as `save_adapter` wrote them; the file's header is left out."""
    path = folder / "adapter_model.safetensors"
    with path.open("rb") as file:
        header = int.from_bytes(file.read(_LENGTH), "little")
    return 8 * (path.stat().st_size - _LENGTH - header)


def size_summary(folder: Path, *, entries: int, base_bits_per_weight: float, weights: int) -> dict[str, object]:
    """The adapter's bits an entry, and the bits a weight of base and adapter together.

    Args:
        folder: The adapter's.
        entries: How many entries it has in all layers.
        base_bits_per_weight: Of the quantized layers: codes, scales, zeros.
        weights: How many weights are quantized.
    """
    bits = stored_bits(folder)
    return {"adapter_bits_per_entry": bits / entries, "bits_per_weight": base_bits_per_weight + bits / weights}
