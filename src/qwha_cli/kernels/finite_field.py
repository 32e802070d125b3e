"""The quadratic character of a finite field GF(p^k): which differences of elements are squares.

Element number `i` of GF(p^k) is the polynomial whose coefficients are the base-p digits of i, lowest first. The field is the
quotient by a primitive polynomial, so that x generates all non-zero elements and the squares are its even powers. Paley's
Hadamard matrices (paley.py) are made of the character of a_i − a_j.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4096)
def prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with number = p^k and p prime, or None."""
    if number < 2:
        return None
    prime = next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)
    rest, exponent = number, 0
    while rest % prime == 0:
        rest //= prime
        exponent += 1
    return (prime, exponent) if rest == 1 else None


def character(prime: int, exponent: int) -> Tensor:
    """The matrix chi(a_i − a_j) over GF(prime^exponent), prime odd.

    Returns:
        (q, q) int8: 0 on the diagonal, +1 where the difference is a square, −1 elsewhere.
    """
    order = prime**exponent
    chi = torch.full((order,), -1, dtype=torch.int8)
    chi[0] = 0
    chi[torch.tensor(_squares(prime, exponent))] = 1
    numbers = torch.arange(order)
    difference = torch.zeros((order, order), dtype=torch.int64)
    for place in range(exponent):
        digit = numbers // prime**place % prime
        difference += (digit[:, None] - digit[None, :]) % prime * prime**place
    return chi[difference]


def _squares(prime: int, exponent: int) -> list[int]:
    """The numbers of the non-zero squares of GF(prime^exponent)."""
    if exponent == 1:
        return sorted({i * i % prime for i in range(1, prime)})
    # all monic polynomials of this degree in a fixed order: the first primitive one is always the same
    for low in itertools.product(range(prime), repeat=exponent):
        powers = _powers_of_x(low, prime)
        if len(powers) == prime**exponent - 1:
            return powers[::2]
    raise AssertionError(f"no primitive polynomial of degree {exponent} over GF({prime})")


def _powers_of_x(low: tuple[int, ...], prime: int) -> list[int]:
    """The numbers of 1, x, x², ... modulo x^k + low(x), until 1 comes again; none when it never does."""
    degree = len(low)
    one = (1,) + (0,) * (degree - 1)
    element, numbers = one, []
    # with low(0) = 0, x is not invertible: its powers never come back to 1 and the loop would not end
    while low[0] != 0:
        numbers.append(sum(c * prime**i for i, c in enumerate(element)))
        carry = element[-1]
        element = tuple((c - carry * m) % prime for c, m in zip((0, *element[:-1]), low, strict=True))
        if element == one:
            return numbers
    return numbers
