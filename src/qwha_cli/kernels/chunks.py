"""How many rows are worked on at once."""

from __future__ import annotations

from collections.abc import Iterator

# work whose memory grows with its rows takes as many at once as fit into this
CHUNK_BYTES = 256 * 2**20


def chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Consecutive slices of rows, each within CHUNK_BYTES (or one row)."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
