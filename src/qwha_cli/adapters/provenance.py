"""What an adapter belongs to: the frozen quantized base and the Hadamard matrices, checked before anything is changed.

An adapter that starts from W − Q̂ is right on the base it was computed for and wrong on every other, the unquantized model
included. Nothing in peft would notice, so the adapter's config carries the base's fingerprint and a digest of each H.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from qwha_cli.errors import ArtifactError
from qwha_cli.kernels.hadamard import plan
from qwha_cli.quant.fingerprint import fingerprint, packed_modules


def base_fingerprint(model: nn.Module) -> str | None:
    """SHA-256 over the model's quantized tensors, adapters and wrappers not counted; None if it has no quantized layer.

    Args:
        model: A transformers model or a PeftModel around it, with or without adapters.
    """
    return fingerprint(model) if packed_modules(model) else None


def check_base(expected: str | None, model: nn.Module, *, where: str = "adapter_config.json") -> None:
    """Refuse a base other than the one that an adapter was made for.

    Args:
        expected: The fingerprint that the adapter carries; None (a fresh adapter, or an unquantized base) accepts any.
        model: The base, before the adapter is put on it.
        where: The file that the fingerprint was read from.

    Raises:
        ArtifactError: The fingerprints differ; the message shows both.
    """
    if expected is None or any(module.codes().device.type == "meta" for module in packed_modules(model).values()):
        return  # a skeleton's codes are still on the disk: who opened it knows what it opened
    found = base_fingerprint(model)
    if found != expected:
        raise ArtifactError(
            f"the adapter was made for the base with fingerprint {expected}, this one has {found or 'no quantized layers'}",
            where=f"{where} base_fingerprint",
            remedy="load the base that it was trained on (1-quantize of the same run), or train an adapter for this one",
        )


def hadamard_digests(sizes: Iterable[int]) -> dict[str, str]:
    """Digest of the Hadamard matrix by size; the sizes as text, because JSON has no other keys."""
    return {str(size): plan(size).digest for size in sorted(set(sizes))}


def check_transform(expected: dict[str, str] | None) -> None:
    """Refuse an adapter that was made with other Hadamard matrices than this version constructs.

    Args:
        expected: `hadamard_digest` of the adapter's config; None for a fresh adapter.

    Raises:
        ArtifactError: A digest differs; the message shows both.
    """
    for size, digest in (expected or {}).items():
        found = plan(int(size)).digest
        if found != digest:
            raise ArtifactError(
                f"the adapter was made with a Hadamard matrix of size {size} whose digest is {digest}, this version's is {found}",
                where="adapter_config.json hadamard_digest",
                remedy="load it with the version of qwha that made it",
            )
