"""The effective weight: base plus spectrum in its basis, rounded once, exact gradients, and Triton's numbers those of torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize
from qwha_cli.kernels.effective_weight import effective_weight, gather_entries
from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.sparse_matmul import SparseRows
from support.codes import CASES, HALF, Case, codes_of, random_places
from support.triton import HAS_TRITON, run_interpreted

SHAPE = (7, 12)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_it_is_base_plus_spectrum_in_its_basis() -> None:
    matrix, places = numbers(*SHAPE), random_places(SHAPE)
    values, before = numbers(len(places), seed=2), matrix.clone()
    spectrum = places.with_values(values).dense()
    how = {"scale": 0.5, "dtype": torch.float64}
    in_hadamard = effective_weight(matrix, values, places, basis="hadamard", **how)
    torch.testing.assert_close(in_hadamard, matrix + 0.5 * spectrum, rtol=0, atol=1e-12)
    in_weight = effective_weight(matrix, values, places, basis="weight", **how)
    torch.testing.assert_close(in_weight, matrix + 0.5 * spectrum @ dense(12).T, rtol=0, atol=1e-12)
    assert torch.equal(effective_weight(matrix, values, places, basis="weight", transform="identity", **how), in_hadamard)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
@pytest.mark.parametrize("transform", ["wht", "identity"])
def test_it_differentiates_values_and_a_dense_base(basis: str, transform: str) -> None:
    matrix, places = numbers(*SHAPE).requires_grad_(), random_places(SHAPE)
    values = numbers(len(places), seed=2).requires_grad_()

    def weight(base: Tensor, values: Tensor) -> Tensor:
        return effective_weight(base, values, places, basis=basis, scale=2.0, dtype=torch.float64, transform=transform)

    assert torch.autograd.gradcheck(weight, (matrix, values))
    assert torch.autograd.gradcheck(weight, (matrix.detach(), values))


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
def test_it_differentiates_values_over_codes(basis: str) -> None:
    codes = codes_of(CASES[0])
    places = random_places(codes.shape, density=0.02)
    values = numbers(len(places)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: effective_weight(codes, v, places, basis=basis, scale=2.0, dtype=torch.float64), (values,)
    )


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_values_leave_the_base_bit_for_bit(basis: str, dtype: torch.dtype) -> None:
    codes = codes_of(CASES[0])
    places = random_places(codes.shape)
    for base in (codes, dequantize(codes, torch.float32)):
        weight = effective_weight(base, torch.zeros(len(places)), places, basis=basis, scale=1.0, dtype=dtype)
        assert torch.equal(weight, dequantize(codes, dtype))


def test_half_precision_is_rounded_once() -> None:
    codes = codes_of(CASES[0])
    places = random_places(codes.shape)
    values = numbers(len(places), dtype=torch.float32) * 0.01
    exact = effective_weight(codes, values, places, basis="hadamard", scale=0.3, dtype=torch.float32)
    for base in (codes, dequantize(codes, torch.float32)):
        assert torch.equal(
            effective_weight(base, values, places, basis="hadamard", scale=0.3, dtype=torch.bfloat16), exact.bfloat16()
        )


def test_a_matrix_is_read_at_the_places() -> None:
    places = random_places(SHAPE)
    matrix = numbers(*SHAPE)
    assert torch.equal(gather_entries(matrix, places, scale=0.5), matrix.view(-1)[places.flat_index.long()] * 0.5)
    assert gather_entries(matrix.bfloat16(), places, scale=0.5).dtype == torch.float32
    transposed = numbers(12, 7).mT
    assert torch.equal(gather_entries(transposed, places, scale=1.0), transposed.reshape(-1)[places.flat_index.long()])


def test_what_does_not_fit_is_refused() -> None:
    places = random_places(SHAPE)
    values = torch.zeros(len(places))
    with pytest.raises(KernelError, match=f"{len(places) - 1} values for {len(places)} places"):
        effective_weight(numbers(*SHAPE), values[1:], places, basis="weight", scale=1.0, dtype=torch.float32)
    with pytest.raises(KernelError, match=r"a base \(12, 7\) for places in \(7, 12\)"):
        effective_weight(numbers(12, 7), values, places, basis="weight", scale=1.0, dtype=torch.float32)
    with pytest.raises(KernelError, match=r"a matrix \(12, 7\) for places in \(7, 12\)"):
        gather_entries(numbers(12, 7), places, scale=1.0)


def places_on(shape: tuple[int, int], device: str, *, density: float = 0.05) -> Places:
    """Rows of very different lengths, one without entries, one full."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    mask[1], mask[2] = False, True
    return Places.from_rows(SparseRows.from_mask(torch.zeros(shape), mask).to(device))


def as_torch(codes: Codes, dtypes: list[torch.dtype]) -> None:
    device = str(codes.device)
    places = places_on(codes.shape, device)
    values = numbers(len(places), dtype=torch.float32).to(device) * 0.05
    for dtype in dtypes:
        for base in (codes, dequantize(codes, torch.float32)):
            how = {"basis": "hadamard", "scale": 0.3, "dtype": dtype}
            found = effective_weight(base, values, places, backend="triton", **how)
            assert found.dtype == dtype
            assert torch.equal(found, effective_weight(base, values, places, backend="torch", **how))
        matrix = dequantize(codes, dtype, backend="torch")
        how = {"basis": "weight", "scale": 0.3, "dtype": dtype}
        found = effective_weight(matrix, values, places, backend="triton", **how)
        # the transform runs in another order, so each has its own rounding
        exact = effective_weight(matrix.double(), values.double(), places, **how | {"dtype": torch.float64})
        slow = effective_weight(matrix, values, places, backend="torch", **how)
        assert (found - exact).norm() <= 2 * (slow - exact).norm() + 1e-6 * exact.norm()
        for given in (matrix, matrix.mT.contiguous().mT):
            found = gather_entries(given, places, scale=0.3, backend="triton")
            assert torch.equal(found, gather_entries(given, places, scale=0.3, backend="torch"))


def half_values(codes: Codes, backend: str) -> None:
    """Values in bfloat16 give the bits that the same numbers give in float32."""
    places = places_on(codes.shape, str(codes.device))
    half = (numbers(len(places), dtype=torch.float32).to(codes.device) * 0.05).bfloat16()
    for base, basis in ((codes, "hadamard"), (codes, "weight"), (dequantize(codes, torch.float32), "hadamard")):
        for dtype in (torch.float32, torch.float16):
            how = {"basis": basis, "scale": 0.3, "dtype": dtype, "backend": backend}
            assert torch.equal(effective_weight(base, half, places, **how), effective_weight(base, half.float(), places, **how))


@pytest.mark.parametrize("case", CASES[:3])
def test_values_in_bfloat16_give_the_bits_of_float32_ones(case: Case) -> None:
    half_values(codes_of(case), "torch")


def nothing_to_add(codes: Codes) -> None:
    nothing = Places.from_flat(torch.zeros(0, dtype=torch.int32, device=codes.device), shape=codes.shape)
    values = torch.zeros(0, device=codes.device)
    empty = effective_weight(codes, values, nothing, basis="hadamard", scale=1.0, dtype=torch.float32, backend="triton")
    assert torch.equal(empty, dequantize(codes, torch.float32))
    assert gather_entries(empty, nothing, scale=1.0, backend="triton").numel() == 0


def cut_otherwise(codes: Codes) -> None:
    """Other sizes of programs and tiles, in one launch and in two."""
    from qwha_cli.kernels.dequantize_cut import Config
    from qwha_cli.kernels.dequantize_triton import launch

    places = places_on(codes.shape, str(codes.device))
    values = numbers(len(places), dtype=torch.float32).to(codes.device) * 0.05
    expected = effective_weight(codes, values, places, basis="hadamard", scale=0.3, dtype=torch.float32, backend="torch")
    for config in (Config(8, 32, 64), Config(32, 64, 0, stages=2), Config(16, 128, 128)):
        weight = torch.full_like(expected, torch.nan)
        launch(weight, codes, (values, places, 0.3), config)
        assert torch.equal(weight, expected), config


# Triton's interpreter cuts numbers to bfloat16 instead of rounding them
_INTERPRETED = """
import torch
from kernels.test_effective_weight import CASES, as_torch, codes_of, cut_otherwise, half_values, nothing_to_add
half_values(codes_of(CASES[0]), "triton")
for number, codes in enumerate(map(codes_of, CASES)):
    as_torch(codes, [torch.float16 if number % 2 else torch.float32])
for number in (1, 4, 7):
    cut_otherwise(codes_of(CASES[number]))
nothing_to_add(codes)
print("interpreted", len(CASES))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_interpreted_gives_torchs_bits() -> None:
    assert run_interpreted(_INTERPRETED) == f"interpreted {len(CASES)}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [*CASES, (515, 3072, "rtn", 2, 64, "fine"), (1024, 4096, "rtn", 3, 128, "integer")])
def test_triton_on_a_gpu_gives_torchs_bits(case: Case) -> None:
    codes = codes_of(case, "cuda")
    as_torch(codes, [*HALF, torch.float32])
    cut_otherwise(codes)
    half_values(codes, "triton")
    nothing_to_add(codes)
