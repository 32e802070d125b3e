"""The column sweep: the formulas in float64, blocks that are no power of two, and Triton (interpreted here) equal to torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import choose
from qwha_cli.kernels.column_sweep import descent_sweep, feedback_sweep
from support.triton import HAS_TRITON, run_interpreted

SIZES = [(1, 5), (7, 33), (24, 37), (64, 50), (100, 3)]


def parts(columns: int, rows: int, *, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """State, U, G, scales, zeros."""
    generator = torch.Generator().manual_seed(columns * 1000 + rows)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    factor = torch.triu(torch.randn(columns, columns, generator=generator)) * 0.1 + torch.eye(columns)
    state = torch.randn(columns, rows, generator=generator) * 2
    scales, zeros = torch.rand(columns, rows, generator=generator) + 0.5, torch.rand(columns, rows, generator=generator) * 3
    return tuple(t.to(device) for t in (state, factor, inputs.T @ inputs, scales, zeros))  # pyright: ignore[reportReturnType]


def nearest(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return (values / scales + zeros).round().clamp(0, 2**bits - 1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_feedback_is_the_formula_column_by_column(size: tuple[int, int], bits: int) -> None:
    rest, factor, _, scales, zeros = parts(*size)
    codes, errors = feedback_sweep(rest, factor, scales, zeros, bits=bits, backend="torch")
    now = rest.double()
    for j in range(size[0]):
        code = nearest(now[j], scales[j].double(), zeros[j].double(), bits)
        assert (code == codes[j]).float().mean() > 0.9
        code = codes[j].double()  # where float32 tipped a value between two codes the rest follows it
        error = (now[j] - scales[j].double() * (code - zeros[j].double())) / factor[j, j].double()
        torch.testing.assert_close(errors[j].double(), error, rtol=1e-4, atol=1e-4)
        now -= torch.outer(factor[j].double(), error)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_descent_never_raises_the_error_and_ends_at_the_best_single_codes(size: tuple[int, int], bits: int) -> None:
    _, _, gram, scales, zeros = parts(*size)
    codes = torch.randint(0, 2**bits, size, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    error = torch.randn(*size, generator=torch.Generator().manual_seed(2))
    before = ((gram @ error) * error).sum(0)
    for _ in range(30):
        codes, changes = descent_sweep(gram @ error, gram, codes, scales, zeros, bits=bits, backend="torch")
        error = error - changes
        after = ((gram @ error) * error).sum(0)
        assert (after <= before * (1 + 1e-5) + 1e-4).all()
        before = after
    slope = gram @ error
    best = nearest((codes - zeros) * scales + slope / gram.diagonal()[:, None], scales, zeros, bits)
    assert (best == codes).float().mean() > 0.99


def test_arguments_are_left_alone_and_checked() -> None:
    state, factor, gram, scales, zeros = parts(7, 33)
    kept = state.clone()
    codes, _ = feedback_sweep(state, factor, scales, zeros, bits=2)
    descent_sweep(state, gram, codes, scales, zeros, bits=2)
    assert torch.equal(state, kept)
    with pytest.raises(KernelError, match="matching shapes"):
        feedback_sweep(state, factor[:5], scales, zeros, bits=2)
    with pytest.raises(KernelError, match="float32"):
        feedback_sweep(state.double(), factor, scales, zeros, bits=2)


def test_the_backend_is_chosen_for_a_reason_and_never_silently() -> None:
    chosen = choose("auto", op="column_sweep", device=torch.device("cpu"))
    assert chosen.name == "torch"
    assert chosen.reason
    with pytest.raises(KernelError, match="cannot run"):
        choose("triton", op="column_sweep", device=torch.device("cpu"))
    assert choose("torch", op="column_sweep", device=torch.device("cuda")).reason == "asked for"
    if HAS_TRITON:
        assert choose("auto", op="column_sweep", device=torch.device("cuda")).name == "triton"


_INTERPRETED = """
import torch
from kernels.test_column_sweep import SIZES, same_as_torch
for size in SIZES:
    same_as_torch(size, "cpu")
print("interpreted", len(SIZES))
"""


def same_as_torch(size: tuple[int, int], device: str) -> None:
    state, factor, gram, scales, zeros = parts(*size, device=device)
    codes: dict[str, Tensor] = {}
    for backend in ("torch", "triton"):
        codes[backend], errors = feedback_sweep(state, factor, scales, zeros, bits=2, backend=backend)
        chosen, changes = descent_sweep(100 * state, gram, codes["torch"], scales, zeros, bits=2, backend=backend)
        if backend == "torch":
            expected = codes[backend], errors, chosen, changes
        else:
            assert (codes[backend] != expected[0]).float().mean() < 0.01
            assert (chosen != expected[2]).float().mean() < 0.01
            alike = (codes[backend] == expected[0]).all(0) & (chosen == expected[2]).all(0)
            torch.testing.assert_close(errors[:, alike], expected[1][:, alike], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(changes[:, alike], expected[3][:, alike], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_interpreted_is_torch() -> None:
    assert run_interpreted(_INTERPRETED) == f"interpreted {len(SIZES)}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [*SIZES, (128, 4096)])
def test_triton_on_a_gpu_is_torch(size: tuple[int, int]) -> None:
    same_as_torch(size, "cuda")
