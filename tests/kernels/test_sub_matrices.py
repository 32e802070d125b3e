"""Sub-matrices: what they are, their padding, and Triton (interpreted here) equal to torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.sub_matrices import sub_matrices
from support.triton import HAS_TRITON, run_interpreted

SIZES = [(3, 5, 2), (4, 40, 33), (2, 70, 65), (7, 64, 32)]


def sets(batch: int, size: int, width: int, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A symmetric matrix with a border of zeros, and sets of which the first is all padding and the last is full."""
    generator = torch.Generator().manual_seed(size)
    square = torch.zeros(size + 1, size + 1)
    inner = torch.randn(size, size, generator=generator)
    square[:size, :size] = inner + inner.T
    columns = torch.stack([torch.randperm(size, generator=generator)[:width] for _ in range(batch)])
    for member in range(batch):
        columns[member, width * member // (batch - 1) :] = size
    return square.to(device), columns.to(device)


@pytest.mark.parametrize("shape", SIZES)
def test_each_set_has_its_rows_and_columns_and_the_identity_behind_them(shape: tuple[int, int, int]) -> None:
    square, columns = sets(*shape)
    for gathered, own in zip(sub_matrices(square, columns, backend="torch"), columns, strict=True):
        members = own[own < shape[1]]
        expected = torch.eye(shape[2])
        expected[: len(members), : len(members)] = square[members][:, members]
        assert torch.equal(gathered.tril(), expected.tril())


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KernelError, match="a square matrix"):
        sub_matrices(torch.zeros(3, 4), torch.zeros(2, 2, dtype=torch.int64))


def same_as_torch(shape: tuple[int, int, int], device: str) -> None:
    square, columns = sets(*shape, device=device)
    for dtype in (torch.float32, torch.float64):
        both = [sub_matrices(square.to(dtype), columns, backend=backend).tril() for backend in ("torch", "triton")]
        assert torch.equal(both[0], both[1])
        # a view with a longer stride, as the row fit has it
        wide = torch.zeros(square.shape[0], square.shape[1] + 3, dtype=dtype, device=device)
        wide[:, : square.shape[1]] = square
        assert torch.equal(sub_matrices(wide[:, : square.shape[1]], columns, backend="triton").tril(), both[0])


_INTERPRETED = """
from kernels.test_sub_matrices import SIZES, same_as_torch
for shape in SIZES:
    same_as_torch(shape, "cpu")
print("interpreted", len(SIZES))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_interpreted_is_torch() -> None:
    assert run_interpreted(_INTERPRETED) == f"interpreted {len(SIZES)}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [*SIZES, (512, 4864, 211)])
def test_triton_on_a_gpu_is_torch(shape: tuple[int, int, int]) -> None:
    same_as_torch(shape, "cuda")
