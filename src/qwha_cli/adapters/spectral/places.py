"""Where the entries of an adapter lie: drawn at random before anything was computed or loaded, or read from a layer's stream.

What is drawn is spread over the rows as evenly as whole numbers allow. Values are zero. Conventions as in
`qwha_cli.kernels.sparse_matmul.SparseRows`: row_starts int32 (out + 1,), columns int32 ascending inside a row.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from qwha_cli.errors import ArtifactError, KernelError
from qwha_cli.kernels.gaps import decode_gaps
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.sparse_matmul import SparseRows

_CHUNK_ELEMENTS = 1 << 22  # 4M random numbers at a time: 50 MB at most, whatever the layer's size


def budget(shape: tuple[int, int], rank: int) -> int:
    """Entries of a layer (out, in): rank · (in + out), as many as LoRA has parameters, but never more than there are weights."""
    return min(rank * (shape[0] + shape[1]), shape[0] * shape[1])


def random_rows(shape: tuple[int, int], *, entries: int, seed: int, name: str) -> SparseRows:
    """Zero values at places drawn uniformly, without repetition in a row; the same for the same seed and name on every device.

    Args:
        shape: (out, in).
        entries: How many; between out and out · in, so that each row has one.
        seed: Seed of the adapter.
        name: Module name, mixed into the seed, so that two layers of one shape differ.
    """
    # one hash of both: torch's generator takes in only the lowest 32 bits of a seed
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    out_features, in_features = shape
    # which rows get the one more is drawn too: the first rows are not special
    counts = _even_counts(entries, out_features)[torch.randperm(out_features, generator=generator)]
    most = int(counts.max())
    columns: list[Tensor] = []
    for part in counts.split(max(1, _CHUNK_ELEMENTS // in_features)):
        keys = torch.rand(len(part), in_features, generator=generator)
        wanted = torch.arange(most) < part[:, None]
        mask = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, keys.topk(most, dim=1).indices, wanted)
        columns.append(mask.nonzero()[:, 1])
    return _rows(shape, counts, torch.cat(columns))


def read_places(gaps: Tensor, entries: int, *, shape: tuple[int, int], device: torch.device, name: str) -> Places:
    """Places out of an adapter's stream of bytes.

    Args:
        gaps: uint8, see kernels/gaps.py, on any device.
        entries: How many there are.
        shape: (out, in).
        device: Where they are wanted.
        name: Of the adapter, for the error.

    Raises:
        ArtifactError: The stream is damaged, or was never loaded.
    """
    try:
        flat = decode_gaps(gaps.to(device), entries=entries, size=shape[0] * shape[1])
    except KernelError as error:
        raise ArtifactError(
            f"the places of adapter {name} are damaged or were never loaded: {error.message}",
            remedy="load it from an undamaged folder; a config with entries is for loading, not for a fresh adapter",
        ) from error
    return Places.from_flat(flat, shape=shape)


def _even_counts(entries: int, num_rows: int) -> Tensor:
    counts = torch.full((num_rows,), entries // num_rows)
    counts[: entries % num_rows] += 1
    return counts


def _rows(shape: tuple[int, int], counts: Tensor, columns: Tensor) -> SparseRows:
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    return SparseRows(row_starts=starts, columns=columns.int(), values=torch.zeros(len(columns)), shape=shape)
