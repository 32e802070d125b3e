"""Sparse rows and what is made of them: the product, the backend's choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qwha_cli.errors import KernelError
from qwha_cli.kernels import backend
from qwha_cli.kernels.backend import choose
from qwha_cli.kernels.sparse_matmul import SparseRows, sparse_matmul
from support.triton import HAS_TRITON


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> torch.Tensor:
    chosen = torch.rand(7, 12, generator=torch.Generator().manual_seed(1)) < 0.3
    chosen[3] = False
    return chosen


def test_rows_from_a_mask_hold_the_masked_entries_in_ascending_order(matrix: torch.Tensor, mask: torch.Tensor) -> None:
    rows = SparseRows.from_mask(matrix, mask)
    assert torch.equal(rows.dense(), matrix * mask)
    assert torch.equal(rows.counts(), mask.sum(dim=1).to(torch.int32))
    for index in (rows.row_starts, rows.columns, rows.flat_index(), rows.counts(), rows.row_index()):
        assert index.dtype == torch.int32
    assert torch.equal(rows.flat_index().long(), mask.flatten().nonzero().flatten())


def test_entries_that_are_zero_stay_entries(mask: torch.Tensor) -> None:
    rows = SparseRows.from_mask(torch.zeros(7, 12), mask)
    assert rows.values.numel() == int(mask.sum())


def test_moving_changes_the_values_dtype_only(matrix: torch.Tensor, mask: torch.Tensor) -> None:
    rows = SparseRows.from_mask(matrix, mask).to("cpu", torch.bfloat16)
    assert rows.values.dtype == torch.bfloat16
    assert rows.columns.dtype == torch.int32
    assert rows.dense(torch.float32).dtype == torch.float32


def test_rounded_values_are_float32_numbers_that_bfloat16_holds() -> None:
    rows = SparseRows.from_mask(torch.randn(4, 5), torch.ones(4, 5, dtype=torch.bool))
    once = rows.rounded(torch.bfloat16)
    assert once.values.dtype == torch.float32
    assert torch.equal(once.values, rows.values.bfloat16().float())
    assert torch.equal(once.rounded(torch.bfloat16).values, once.values)
    assert torch.equal(rows.rounded(torch.float32).values, rows.values)


# one token goes entry by entry, fifty through the dense matrix
@pytest.mark.parametrize("shape", [(12,), (1, 12), (50, 12), (2, 25, 12), (0, 12)])
def test_the_sparse_product_is_the_dense_one(shape: tuple[int, ...], matrix: torch.Tensor, mask: torch.Tensor) -> None:
    z = torch.randn(shape, dtype=torch.float64)
    rows = SparseRows.from_mask(matrix, mask)
    assert torch.allclose(sparse_matmul(z, rows), z @ (matrix * mask).T, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 20])
def test_the_sparse_product_differentiates_both_factors(tokens: int, matrix: torch.Tensor, mask: torch.Tensor) -> None:
    rows = SparseRows.from_mask(matrix, mask)
    z = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    values = rows.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, v: sparse_matmul(a, rows.with_values(v)), (z, values))


def test_a_wrong_number_of_columns_is_refused(matrix: torch.Tensor, mask: torch.Tensor) -> None:
    with pytest.raises(KernelError, match="z has 11 columns, the sparse matrix has 12"):
        sparse_matmul(torch.randn(2, 11), SparseRows.from_mask(matrix, mask))


def test_a_matrix_past_32_bit_places_is_refused() -> None:
    rows = SparseRows(torch.zeros(3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), (2**16, 2**15))
    with pytest.raises(KernelError, match="65536 x 32768"):
        rows.flat_index()


def test_the_backend_and_its_reason_are_told() -> None:
    cpu = torch.device("cpu")
    assert choose("auto", op="gaps", device=cpu).name == "torch"
    assert "no Triton kernel" in choose("auto", op="gaps", device=cpu).reason
    assert choose("torch", op="gaps", device=cpu).reason == "asked for"
    with pytest.raises(KernelError, match="no Triton kernel") as caught:
        choose("triton", op="gaps", device=cpu)
    assert caught.value.where == "gaps"
    assert caught.value.remedy == "use backend auto or torch"


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_cards_without_the_instructions_that_kernels_have_take_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [SimpleNamespace(name="New Card", major=8, minor=0), SimpleNamespace(name="Old Card", major=7, minor=5)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    # without their memory, which is other tests'
    monkeypatch.setattr(backend, "_choose", backend._choose.__wrapped__)
    monkeypatch.setattr(backend, "_lacking_card", backend._lacking_card.__wrapped__)
    assert choose("auto", op="wht", device=torch.device("cuda:0")).name == "triton"
    assert choose("auto", op="wht", device=torch.device("cuda")).name == "triton"
    assert "Old Card has 7.5" in choose("auto", op="wht", device=torch.device("cuda:1")).reason
    with pytest.raises(KernelError, match=r"8\.0"):
        choose("triton", op="wht", device=torch.device("cuda:1"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in choose("auto", op="wht", device=torch.device("cuda:0")).reason
