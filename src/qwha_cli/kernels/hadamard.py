"""Which Hadamard matrix H_n belongs to a size n, and how it is made.

H_n is orthonormal: H_n = blockdiag of m copies of H_b with n = m·b, and H_b = (base ⊗ Sylvester(2^k)) / sqrt(b). `base` is the
smallest ±1 Hadamard matrix known here that fits: Paley I and II (paley.py), Williamson (williamson.py), or a Kronecker product of
two smaller ones. One block (m = 1) is the rule: it holds for the sizes of all common models; sizes without a construction get the
largest possible blocks. H is not symmetric in general. This file makes matrices; wht.py multiplies by them without making H_n.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.paley import has_paley_one, has_paley_two, paley_one, paley_two
from qwha_cli.kernels.williamson import williamson, williamson_orders

# a base takes part in a product as a dense matrix: larger ones would turn the transform into an n × n product
_LARGEST_BASE = 2048


@dataclass(frozen=True)
class HadamardPlan:
    """How H_size is composed: size / block copies of base ⊗ Sylvester(2^log2), block = base · 2^log2."""

    size: int
    block: int
    base: int
    log2: int

    @property
    def exact(self) -> bool:
        """Whether H is one dense block, so that it mixes every input with every other."""
        return self.block == self.size

    @property
    def digest(self) -> str:
        """sha256 of the composition and of the base's signs: equal digests, equal matrices."""
        return _digest(self)


@lru_cache(maxsize=1024)
def plan(size: int) -> HadamardPlan:
    """The Hadamard matrix for a size: the largest block dividing it that has a construction, over the smallest base.

    Args:
        size: n >= 1.

    Raises:
        KernelError: size < 1.
    """
    if size < 1:
        raise KernelError(f"a Hadamard transform needs a positive size, got {size}")
    for copies in range(1, size + 1):
        if size % copies == 0 and (base := _smallest_base(size // copies)) is not None:
            block = size // copies
            return HadamardPlan(size, block, base, (block // base).bit_length() - 1)
    raise AssertionError("order 1 always exists")


@lru_cache(maxsize=32)
def base_matrix(order: int) -> Tensor:
    """A Hadamard matrix of an order that `plan` can choose as base, or of a power of two.

    Returns:
        (order, order) int8 of ±1 with H Hᵀ = order · I. Shared and cached: do not write into it.

    Raises:
        KernelError: No construction is known here for this order.
    """
    # cached for good, so whatever mode the first caller is in must not stick: a tensor made under inference_mode could never take
    # part in training, and transformers builds its skeletons with the meta device as default
    with torch.inference_mode(False), torch.device("cpu"):
        return _make(order)


def dense(size: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """H_size itself, for references and tests.

    Returns:
        (size, size) orthonormal, of the dtype and on the device asked for.
    """
    chosen = plan(size)
    block = torch.kron(base_matrix(chosen.base), base_matrix(2**chosen.log2)).to(torch.float64) / math.sqrt(chosen.block)
    return torch.block_diag(*[block] * (size // chosen.block)).to(device=device, dtype=dtype)


def combined_digest(sizes: list[int]) -> str:
    """One sha256 over the digests of several sizes, whatever their order and repetition."""
    text = ",".join(f"{size}:{plan(size).digest}" for size in sorted(set(sizes)))
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=256)
def _digest(chosen: HadamardPlan) -> str:
    signs = base_matrix(chosen.base).numpy().tobytes()
    header = f"qwha hadamard 1: {chosen.size} = blocks of {chosen.block} = {chosen.base} * 2^{chosen.log2}\n"
    return hashlib.sha256(header.encode() + signs).hexdigest()


def _smallest_base(size: int) -> int | None:
    """The smallest order b with size = b·2^k that has a construction; None if there is none."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    order = odd
    while order <= min(size, _LARGEST_BASE):
        if order == 1 or _construction(order) is not None:
            return order
        order *= 2
    return None


@lru_cache(maxsize=4096)
def _construction(order: int) -> str | None:
    """The name of the way a matrix of this order is made; None if none is known here."""
    if order & (order - 1) == 0:
        return "sylvester"
    if order % 4:
        return None
    if has_paley_one(order):
        return "paley-1"
    if has_paley_two(order):
        return "paley-2"
    if order in williamson_orders():
        return "williamson"
    return "kronecker" if _kronecker_factors(order) else None


def _kronecker_factors(order: int) -> tuple[int, int] | None:
    """Two smaller orders whose product this is and which both have a construction; factor 2 is allowed."""
    for factor in range(2, math.isqrt(order) + 1):
        if order % factor == 0 and _construction(factor) is not None and _construction(order // factor) is not None:
            return factor, order // factor
    return None


def _make(order: int) -> Tensor:
    match _construction(order):
        case "sylvester":
            matrix = torch.ones((1, 1), dtype=torch.int8)
            for _ in range(order.bit_length() - 1):
                matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), matrix)
            return matrix
        case "paley-1":
            return paley_one(order)
        case "paley-2":
            return paley_two(order)
        case "williamson":
            return williamson(order)
        case "kronecker":
            factors = _kronecker_factors(order)
            assert factors is not None, "this is what the construction's name means"
            return torch.kron(base_matrix(factors[0]), base_matrix(factors[1]))
        case _:
            raise KernelError(
                f"no Hadamard matrix of order {order} is known here",
                remedy="use an order that plan() chooses: Sylvester, Paley, Williamson and their products",
            )
