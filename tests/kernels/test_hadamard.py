"""Hadamard matrices: every construction against its definition in integers, and every size of the models we promise."""

from __future__ import annotations

import pytest
import torch

from qwha_cli.errors import KernelError
from qwha_cli.kernels.finite_field import character, prime_power
from qwha_cli.kernels.hadamard import base_matrix, combined_digest, dense, plan
from qwha_cli.kernels.williamson import williamson_orders

# in-features of q/k/v/gate/up (hidden), o (heads · head size) and down (ffn)
MODEL_SIZES = {
    "Llama 1, 2": [4096, 5120, 6656, 8192, 11008, 13824, 17920, 22016, 28672],
    "Llama 3 - 3.3": [2048, 3072, 4096, 8192, 14336, 16384, 28672, 53248],
    "Mistral": [4096, 5120, 12288, 14336, 28672, 32768],
    "Qwen2, 2.5": [896, 1536, 2048, 3584, 4864, 5120, 8192, 8960, 11008, 13824, 18944, 27648, 29568],
    "Qwen3": [768, 1024, 2048, 2560, 3072, 4096, 5120, 6144, 8192, 9728, 12288, 17408, 25600],
    "Gemma 1, 2": [2048, 2304, 3072, 3584, 4096, 4608, 9216, 14336, 16384, 24576, 36864],
    "Gemma 3": [640, 1024, 1152, 2048, 2560, 3840, 4096, 5376, 6912, 10240, 15360, 21504],
    "Phi-3, Phi-4": [3072, 4096, 5120, 8192, 14336, 17920],
    "SmolLM2": [576, 960, 1536, 2048, 2560, 8192],
}
PALEY_ONE = [12, 20, 28, 44, 60, 84, 108, 140, 244, 284]
PALEY_TWO = [36, 52, 76, 100, 124, 148, 164, 196, 220, 244, 252, 340, 388]

DIGESTS = {576: "8326019ab5e8a513", 1536: "26671197a6d05c4e", 11008: "f0c4b15b4ad65982", 53248: "414fccb26e035852"}


@pytest.mark.parametrize("family", MODEL_SIZES)
def test_every_size_of_the_common_models_has_one_dense_block(family: str) -> None:
    inexact = [size for size in MODEL_SIZES[family] if not plan(size).exact]
    assert not inexact


def test_the_list_of_model_sizes_is_not_empty_anywhere() -> None:
    assert len(MODEL_SIZES) == 9
    assert sum(map(len, MODEL_SIZES.values())) >= 80


def test_every_base_up_to_300_is_a_hadamard_matrix_in_integers() -> None:
    bases = {plan(order).base for order in range(1, 301)} | {2**k for k in range(9)}
    for order in sorted(bases):
        matrix = base_matrix(order).to(torch.int32)
        assert matrix.abs().eq(1).all()
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int32)), order
    # 4, 8, 16, ... come from 2^k; among the 4·odd orders those known here
    assert len(bases) >= 40


@pytest.mark.parametrize("order", [*PALEY_ONE, *PALEY_TWO, *williamson_orders(), 924])
def test_each_construction_gives_its_order(order: int) -> None:
    chosen = plan(order)
    assert chosen.exact
    assert chosen.base == order
    matrix = base_matrix(order).to(torch.float64)
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_two_unrelated_orders_are_multiplied_where_nothing_else_fits() -> None:
    # 1904 = 28 · 68; neither 1903, 951, 475 nor a Williamson order serves 1904, 952 or 476
    assert plan(952).block < 952
    assert plan(1904).base == 1904
    matrix = base_matrix(1904).to(torch.float32)
    assert torch.equal(matrix @ matrix.T, 1904 * torch.eye(1904))


def test_williamson_covers_what_paley_leaves_out() -> None:
    assert williamson_orders() == [92, 116, 156, 172]
    assert plan(184).base == 92


@pytest.mark.parametrize("order", [9, 25, 27, 49, 81, 121, 125, 169, 243])
def test_the_character_of_a_prime_power_field_is_balanced_and_has_jacobsthals_product(order: int) -> None:
    power = prime_power(order)
    assert power is not None
    chi = character(*power).to(torch.int32)
    assert torch.equal(chi.sum(dim=1), torch.zeros(order, dtype=torch.int64))
    # Q Qᵀ = q I − J
    assert torch.equal(chi @ chi.T, order * torch.eye(order, dtype=torch.int32) - 1)


def test_prime_power_tells_powers_from_products() -> None:
    assert [prime_power(n) for n in (1, 2, 12, 45, 343, 361, 997)] == [None, (2, 1), None, None, (7, 3), (19, 2), (997, 1)]


@pytest.mark.parametrize(
    ("size", "block"), [(1, 1), (3, 1), (9, 1), (10, 2), (66, 2), (188, 4), (99 * 4, 396), (47 * 8, 8), (35 * 7 * 4, 196)]
)
def test_a_size_without_construction_gets_the_largest_blocks(size: int, block: int) -> None:
    chosen = plan(size)
    assert chosen.block == block
    assert chosen.exact == (size == block)
    assert chosen.base * 2**chosen.log2 == block


@pytest.mark.parametrize("size", [1, 3, 12, 48, 80, 66, 188, 576])
def test_the_dense_matrix_is_orthonormal(size: int) -> None:
    matrix = dense(size)
    identity = torch.eye(size, dtype=torch.float64)
    assert (matrix @ matrix.T - identity).abs().max() < 1e-13
    assert (matrix.T @ matrix - identity).abs().max() < 1e-13


def test_powers_of_two_are_sylvesters_matrix() -> None:
    assert torch.equal(base_matrix(4).sign(), torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]))


def test_digests_never_change_because_adapters_on_disk_carry_them() -> None:
    assert {size: plan(size).digest[:16] for size in DIGESTS} == DIGESTS
    assert combined_digest([1536, 576, 576]) == combined_digest([576, 1536])
    assert combined_digest([576]) != combined_digest([1536])


def test_sizes_and_orders_that_cannot_be_are_refused() -> None:
    with pytest.raises(KernelError, match="positive size, got 0"):
        plan(0)
    with pytest.raises(KernelError, match="no Hadamard matrix of order 188"):
        base_matrix(188)


def test_a_base_made_under_inference_mode_serves_training_later() -> None:
    base_matrix.cache_clear()
    with torch.inference_mode():
        matrix = base_matrix(12)
    assert not matrix.is_inference()
