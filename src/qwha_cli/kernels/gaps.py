"""Places of a sparse matrix as bytes: how far each entry lies behind the one before.

The matrix (out, in) is read row by row as one line of out · in places, and the bytes move a cursor along it, from place 0:

    byte g < 255   skip g places; the place reached is an entry, and the cursor goes on behind it
    byte 255       skip 255 places, none of which is an entry

So a distance of g free places costs g // 255 bytes of 255 and one byte g % 255. Rows need no mark of their own: a place knows its
row. The last byte stands for a place just behind the matrix, out · in. With it, the number of entries and the length of the walk
are both fixed, and no single damaged byte leaves both as they were; nor can a stream that walks exactly so far hold a place that
is outside of its matrix or occurs twice.

A stream has p + 1 + (number of 255s) bytes for p entries, and of 255s at most out · in / 255: never more than 8 bits an entry and
0.032 bits a weight together. Entries strewn at random over 1 % of the places or more cost 8 to 8.7 bits each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.errors import KernelError

SKIP = 255
"""The byte that only skips, and how many places it skips."""


def encode_gaps(flat_index: Tensor, *, size: int) -> Tensor:
    """Write places as a stream of gaps.

    Args:
        flat_index: (nnz,) int32 or int64, row · in + column, ascending and without repeats; any device.
        size: out · in, at most 2^31 − 1.

    Returns:
        (nnz + 1 + number of 255s,) uint8, same device.

    Raises:
        KernelError: The places do not ascend, or one lies outside of the matrix.
    """
    gaps = torch.cat([flat_index.int(), flat_index.new_full((1,), size, dtype=torch.int32)])
    # in place and in this order: the right side is a tensor of its own, and no difference leaves int32
    gaps[1:] -= gaps[:-1] + 1
    if bool((gaps < 0).any()):
        raise KernelError(f"the places of entries must ascend within 0 .. {size - 1}, without repeats")
    last_bytes = (gaps // SKIP + 1).cumsum(0) - 1
    stream = torch.full((int(last_bytes[-1]) + 1,), SKIP, dtype=torch.uint8, device=gaps.device)
    stream[last_bytes] = (gaps % SKIP).to(torch.uint8)
    return stream


def decode_gaps(stream: Tensor, *, entries: int, size: int) -> Tensor:
    """Read places back from a stream of gaps, exactly.

    Args:
        stream: (bytes,) uint8, any device.
        entries: How many places it should hold.
        size: out · in, at most 2^31 − 1.

    Returns:
        flat_index (entries,) int32, ascending within 0 .. size − 1, same device.

    Raises:
        KernelError: The stream holds another number of places or does not end just behind the matrix: it is damaged, or belongs
            to a matrix of another size.
    """
    is_entry = stream != SKIP
    # 64-bit sums, because a damaged stream may walk further than 32 bits count; one transfer from the device for all three
    sums = torch.stack([is_entry.sum(), stream.sum(dtype=torch.int64), is_entry[-1:].sum()]).tolist()
    found, walked = sums[0] - 1, sums[0] + sums[1]
    if found != entries or walked != size + 1 or not sums[2]:
        raise KernelError(f"{found} places over {walked - 1} weights instead of {entries} places over {size}")
    reached = (stream.int() + is_entry).cumsum(0, dtype=torch.int32)
    return reached[is_entry][:-1] - 1
