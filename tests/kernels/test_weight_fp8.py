"""A weight as 8-bit numbers straight from its codes: its scales' bound, one rounding, both forms, and the same from Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize, row_bounds
from qwha_cli.kernels.fp8 import Fp8Matrix, lacks_fp8, to_fp8
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.weight_fp8 import both_forms
from support.codes import CASES, Case, codes_of, random_places
from support.triton import HAS_TRITON, run_interpreted

LACKING = lacks_fp8(torch.device("cuda")) if torch.cuda.is_available() else "no CUDA device"
SCALE = 0.75
# of these numbers are looked up, of most others not
WHOLE: list[Case] = [
    (48, 96, "rtn", 3, 16, "integer"),
    (20, 288, "rtn", 3, 96, "fine"),
    (68, 192, "rtn", 4, 16, "fine"),
    (132, 160, "rtn", 2, 32, "integer"),
]


def entries(shape: tuple[int, int], density: float = 0.2) -> tuple[Tensor, Places]:
    places = random_places(shape, density=density)
    return torch.randn(len(places), generator=torch.Generator().manual_seed(3)) / 4, places


def exact(base: Codes | Tensor, values: Tensor, places: Places) -> Tensor:
    dense = base.double() if isinstance(base, Tensor) else dequantize(base, torch.float64)
    flat = torch.zeros(dense.numel(), dtype=torch.float64).index_add_(0, places.flat_index, values.double() * SCALE)
    return dense + flat.view(dense.shape)


def check(base: Codes | Tensor, values: Tensor, places: Places) -> None:
    found = both_forms(base, values, places, scale=SCALE)
    whole = exact(base, values, places)
    forward, turned = Fp8Matrix(found.values, found.scales), Fp8Matrix(found.turned, found.turned_scales)
    assert (torch.frexp(found.scales)[0] == 0.5).all(), "scales are powers of two"
    assert torch.equal(found.turned_scales, found.scales.max().expand(whole.shape[1]))
    # float32 sums, then a sixteenth of itself, or half of the smallest step below 2^-6
    for held, scales in ((forward.dense(torch.float64), found.scales), (turned.dense(torch.float64).T, found.scales.max())):
        off = (held - whole).abs() - 1e-6 * whole.abs()
        assert (off <= torch.maximum(whole.abs() / 16, scales.double().expand(whole.shape[0]).unsqueeze(1) * 2.0**-10)).all()


@pytest.mark.parametrize("case", [*CASES, *WHOLE])
def test_every_number_is_rounded_once_and_none_too_large(case: Case) -> None:
    codes = codes_of(case)
    check(codes, *entries(codes.shape))


@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_no_looser_than_twice_the_largest(case: Case) -> None:
    codes = codes_of(case)
    values, places = entries(codes.shape, 0.05)
    scales = both_forms(codes, values, places, scale=SCALE).scales
    assert (scales <= 2 * to_fp8(exact(codes, values, places).float()).scales).all()
    assert (row_bounds(codes) >= dequantize(codes, torch.float32).abs().amax(dim=1)).all()


def test_dense_bases_and_such_without_entries() -> None:
    base = torch.randn(33, 48, generator=torch.Generator().manual_seed(1))
    check(base, *entries((33, 48)))
    nowhere = Places.from_flat(torch.zeros(0, dtype=torch.int32), shape=(33, 48))
    check(base.bfloat16(), torch.zeros(0), nowhere)


def test_what_is_not_finite_stays_so() -> None:
    values, places = entries((32, 48))
    values[0] = float("nan")
    found = both_forms(torch.ones(32, 48), values, places, scale=SCALE)
    assert not torch.isfinite(Fp8Matrix(found.values, found.scales).dense(torch.float32)[0]).all()
    assert torch.isfinite(Fp8Matrix(found.values, found.scales).dense(torch.float32)[1:]).all()
    assert not torch.isfinite(Fp8Matrix(found.turned, found.turned_scales).dense(torch.float32)).all()


CODE = """
import torch
from qwha_cli.kernels.weight_fp8 import both_forms
from support.codes import CASES, codes_of, random_places
cases = [codes_of(case) for case in CASES + WHOLE] + [torch.randn(33, 48), torch.randn(20, 320).bfloat16()]
for base in cases:
    places = random_places(tuple(base.shape))
    values = torch.randn(len(places)) / 4
    one, two = (both_forms(base, values, places, scale=0.75, backend=name) for name in ("torch", "triton"))
    assert torch.equal(one.scales, two.scales), base
    assert torch.equal(one.turned_scales, two.turned_scales)
    assert torch.equal(one.values.float(), two.values.float()), base
    assert torch.equal(one.turned.float(), two.turned.float()), base
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_triton_has_the_same_scales_and_numbers() -> None:
    run_interpreted(f"WHOLE = {WHOLE}" + CODE)


@pytest.mark.gpu
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
@pytest.mark.parametrize("case", [*CASES, *WHOLE, (1024, 3072, "rtn", 2, 64, "integer"), (3072, 896, "rtn", 3, 64, "fine")])
def test_on_a_gpu_the_numbers_are_those_of_torch(case: Case) -> None:
    codes = codes_of(case, "cuda")
    values, places = entries(codes.shape, 0.05)
    values, places = values.cuda(), Places.from_flat(places.flat_index.cuda(), shape=places.shape)
    one = both_forms(codes, values, places, scale=SCALE, backend="torch")
    two = both_forms(codes, values, places, scale=SCALE, backend="triton")
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.float(), b.float())
