"""How many rows of F got how many entries: histograms of one layer whose bins all layers share, so that counts add up.

Edges are 0, 1, and then two an octave, evenly in the logarithm: 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, ... (12 for 11 would be
rounder, but bins of uneven ratio draw teeth into a smooth distribution.) The bin from edge a to edge b holds the rows with
a <= entries < b, so rows without any entry have a bin of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt


@dataclass(frozen=True)
class EntriesHistogram:
    """Rows by their number of entries.

    Attributes:
        edges: Ascending, one more than counts; empty where there is no row.
        counts: Rows from each edge up to, but not with, the next.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]

    def to_json(self) -> dict[str, list[int]]:
        """The form it has in layers.jsonl."""
        return {"edges": list(self.edges), "counts": list(self.counts)}

    @property
    def without_entries(self) -> int:
        """Rows that got no entry."""
        return self.counts[0] if self.edges and self.edges[0] == 0 else 0


def rows_by_entries(entries: Iterable[int]) -> EntriesHistogram:
    """Return the histogram of one layer.

    Args:
        entries: Number of entries of each row.
    """
    return _histogram(Counter(_bin(count) for count in entries))


def total_rows_by_entries(layers: Sequence[Mapping[str, object]]) -> EntriesHistogram | None:
    """Return the histogram over the rows of all layers, or None where no record has one.

    Args:
        layers: Records with `entries_histogram`: {"edges", "counts"}.
    """
    rows: Counter[int] = Counter()
    for layer in layers:
        found = layer.get("entries_histogram")
        edges, counts = (found.get("edges"), found.get("counts")) if isinstance(found, Mapping) else (None, None)
        if isinstance(edges, list) and isinstance(counts, list):
            for edge, count in zip(edges, counts, strict=False):
                rows[_bin(edge)] += count
    return _histogram(rows) if rows else None


def _histogram(rows: Counter[int]) -> EntriesHistogram:
    """Return rows by bin without the empty bins at both ends."""
    filled = [place for place, count in rows.items() if count]
    if not filled:
        return EntriesHistogram((), ())
    places = range(min(filled), max(filled) + 1)
    return EntriesHistogram(
        edges=tuple(_edge(place) for place in (*places, places.stop)), counts=tuple(rows[place] for place in places)
    )


def _edge(place: int) -> int:
    """Return where a bin begins: 0, 1, and from place 2 on 2^(place / 2), rounded."""
    if place < 2:
        return place
    octave, second = divmod(place, 2)
    return (isqrt(8 << (2 * octave)) + 1) // 2 if second else 1 << octave


def _bin(count: int) -> int:
    if count < 2:
        return count
    octave = count.bit_length() - 1
    return 2 * octave + (count >= _edge(2 * octave + 1))
