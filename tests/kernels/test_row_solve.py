"""Row solves: what they are, entries and rows that are absent, failures told, and Triton equal to the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.row_solve import row_solve
from support.triton import HAS_TRITON, run_interpreted

# (out, in, longest row): within one block of the kernel, its edges, several blocks, all columns
SIZES = [(5, 40, 13), (4, 150, 32), (3, 150, 65), (2, 200, 200), (6, 300, 150)]


def problem(out: int, size: int, longest: int, *, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A Gram matrix with a border of zeros, right sides, and rows of 0 to `longest` places; float64."""
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(4 * size, size, dtype=torch.float64, generator=generator)
    gram = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    gram[:size, :size] = (inputs * torch.logspace(0, 1.5, size, dtype=torch.float64)).T @ inputs
    gram[:size, :size] = gram[:size, :size] @ gram[:size, :size].T / size
    gram.diagonal()[:size].add_(0.1 * gram.diagonal().mean())
    right = torch.randn(out, size, dtype=torch.float64, generator=generator) @ gram[:size, :size]
    counts = [longest * row // (out - 1) for row in range(out)]
    columns = torch.cat([torch.randperm(size, generator=generator)[:count].sort().values for count in counts])
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return gram.to(device), right.to(device), starts.to(device), columns.to(torch.int32).to(device)


def reference(gram: Tensor, right: Tensor, starts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Both results by a dense inverse of each row's sub-matrix."""
    values, losses = torch.zeros(columns.numel(), dtype=gram.dtype), torch.zeros(columns.numel(), dtype=gram.dtype)
    for row, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        own = columns[start:end].long()
        inverse = torch.linalg.inv(gram[own][:, own])
        values[start:end] = inverse @ right[row, own]
        losses[start:end] = values[start:end].square() / inverse.diagonal()
    return values, losses


def as_reference(shape: tuple[int, int, int], device: str, *, backend: str, dtype: torch.dtype) -> None:
    exact = problem(*shape, device=device)
    expected = reference(*(tensor.cpu() for tensor in exact))
    gram, right, starts, columns = exact
    # a view with a longer stride, too
    wide = torch.zeros(gram.shape[0], gram.shape[1] + 3, dtype=dtype, device=device)
    wide[:, : gram.shape[1]] = gram
    for square in (gram.to(dtype), wide[:, : gram.shape[1]]):
        with_losses = row_solve(square, right.to(dtype), starts, columns, with_losses=True, backend=backend)
        without = row_solve(square, right.to(dtype), starts, columns, backend=backend)
        assert int(with_losses.failed) == int(without.failed) == 0
        assert without.losses is None
        assert with_losses.losses is not None
        pairs = [(with_losses.values, expected[0]), (without.values, expected[0]), (with_losses.losses, expected[1])]
        for found, wanted in pairs:
            assert found.dtype == torch.float32
            assert float((found.cpu().double() - wanted).norm() / wanted.norm()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SIZES)
def test_torch_is_the_dense_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    as_reference(shape, "cpu", backend="torch", dtype=dtype)


def failures_are_counted(device: str, backend: str) -> None:
    gram, right, starts, columns = problem(5, 150, 100, device=device)
    # only rows that hold this column are broken, those that hold a number that is none too
    for bad in (-1.0, torch.nan):
        broken = gram.to(torch.float32)
        column = int(columns[-1])
        broken[column, column] = bad
        holding = sum(column in columns[a:b].tolist() for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
        assert holding > 0
        solved = row_solve(broken, right.to(torch.float32), starts, columns, with_losses=True, backend=backend)
        assert int(solved.failed) == holding


def test_rows_that_are_not_positive_definite_are_counted() -> None:
    failures_are_counted("cpu", "torch")


def test_a_matrix_without_rows_or_without_entries() -> None:
    nothing = torch.zeros(0, dtype=torch.int32)
    for out in (0, 3):
        solved = row_solve(torch.zeros(5, 5), torch.zeros(out, 4), torch.zeros(out + 1, dtype=torch.int32), nothing)
        assert solved.values.numel() == 0
        assert int(solved.failed) == 0


def test_what_does_not_fit_is_refused() -> None:
    gram, right, starts, columns = problem(5, 40, 13)
    with pytest.raises(KernelError, match="a square matrix"):
        row_solve(gram, right[:, :-1], starts, columns)
    with pytest.raises(KernelError, match="solves in float32"):
        row_solve(gram, right, starts, columns, backend="triton")


_INTERPRETED = """
import torch
from kernels.test_row_solve import SIZES, as_reference, failures_are_counted
for shape in SIZES:
    as_reference(shape, "cpu", backend="triton", dtype=torch.float32)
failures_are_counted("cpu", "triton")
print("interpreted", len(SIZES))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_interpreted_is_the_dense_reference() -> None:
    assert run_interpreted(_INTERPRETED) == f"interpreted {len(SIZES)}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [*SIZES, (700, 1536, 300)])
def test_triton_on_a_gpu_is_the_dense_reference(shape: tuple[int, int, int]) -> None:
    as_reference(shape, "cuda", backend="triton", dtype=torch.float32)
    failures_are_counted("cuda", "triton")
