"""Williamson's Hadamard matrices of order 4m, for the m that Paley's families leave out.

Four symmetric circulants A, B, C, D of ±1 with A² + B² + C² + D² = 4m I give the Hadamard matrix
[[A, B, C, D], [−B, A, −D, C], [−C, D, A, −B], [−D, −C, B, A]]. Their first rows are stored here. They were found by matching
the periodic autocorrelations of all pairs of symmetric sequences (for m = 43: of those constant on cosets of the sixth roots
of unity); tests check H Hᵀ = 4m I in integers, which is all the proof that is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

# m: first rows of A, B, C, D
_FIRST_ROWS: dict[int, tuple[str, str, str, str]] = {
    23: (
        "+--+-+-++++++++++-+-+--",
        "+--++-+-+-++++-+-+-++--",
        "+++---++--++++--++---++",
        "+--+--+++------+++--+--",
    ),
    29: (
        "+--+-++---++++++++++---++-+--",
        "+-+-++---+--++++++--+---++-+-",
        "+++-++-++++---++---++++-++-++",
        "+-+-+----++-++--++-++----+-+-",
    ),
    39: (
        "+---+---+-++-++----++----++-++-+---+---",
        "++--+++-+--++-+----------+-++--+-+++--+",
        "+-++------++--+-+-++++-+-+--++------++-",
        "+---+--++++----+-+-++-+-+----++++--+---",
    ),
    43: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++---++++-+--+--++--------++--+--+-++++---+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
    ),
}


def williamson_orders() -> list[int]:
    """The orders 4m whose first rows are stored."""
    return [4 * m for m in _FIRST_ROWS]


def williamson(order: int) -> Tensor:
    """The Williamson matrix of one of `williamson_orders()`; (order, order) int8."""
    a, b, c, d = (_circulant(row) for row in _FIRST_ROWS[order // 4])
    rows = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _circulant(signs: str) -> Tensor:
    """The circulant whose first row has these signs; int8."""
    first = torch.tensor([1 if sign == "+" else -1 for sign in signs], dtype=torch.int8)
    places = torch.arange(len(signs))
    return first[(places[None, :] - places[:, None]) % len(signs)]
