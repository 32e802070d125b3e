"""Paley's two families of Hadamard matrices, from the squares of a finite field.

I: order q + 1 for a prime power q = 3 mod 4.  II: order 2(q + 1) for a prime power q = 1 mod 4.
R. E. A. C. Paley, On orthogonal matrices, 1933. Entries ±1, H Hᵀ = n I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.kernels.finite_field import character, prime_power


def has_paley_one(order: int) -> bool:
    """Whether order − 1 is a prime power = 3 mod 4."""
    return order % 4 == 0 and prime_power(order - 1) is not None


def has_paley_two(order: int) -> bool:
    """Whether order/2 − 1 is a prime power = 1 mod 4."""
    return order % 4 == 0 and (order // 2 - 1) % 4 == 1 and prime_power(order // 2 - 1) is not None


def paley_one(order: int) -> Tensor:
    """H = I + S with S = [[0, 1], [−1, Q]] and Q the skew character matrix; (order, order) int8."""
    core = _bordered(order - 1, sign=-1)
    return core + torch.eye(order, dtype=torch.int8)


def paley_two(order: int) -> Tensor:
    """H = S ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]] with S = [[0, 1], [1, Q]] symmetric; (order, order) int8."""
    core = _bordered(order // 2 - 1, sign=1)
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(core, plus) + torch.kron(torch.eye(order // 2, dtype=torch.int8), minus)


def _bordered(field: int, *, sign: int) -> Tensor:
    """The conference matrix [[0, 1], [sign, Q]] over GF(field)."""
    power = prime_power(field)
    assert power is not None, "checked by has_paley_*"
    core = torch.zeros((field + 1, field + 1), dtype=torch.int8)
    core[0, 1:] = 1
    core[1:, 0] = sign
    core[1:, 1:] = character(*power)
    return core
