"""The low-rank value, and the frozen linear layer: a dense reference's numbers and gradients, and what is kept for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwha_cli.errors import KernelError
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dense_base
from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.low_rank import LowRank, frozen_linear
from support.quantized import options, run_quantizer

BASES = ["weight", "hadamard"]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_the_value_is_the_product_of_its_factors_and_counts_both() -> None:
    value = LowRank(numbers(3, 48), numbers(80, 3, seed=1))
    assert (value.rank, value.shape, value.num_values) == (3, (80, 48), 3 * 128)
    assert torch.equal(value.dense(), value.b @ value.a)
    torch.testing.assert_close(value.divided(0.4).dense() * 0.4, value.dense(), rtol=1e-12, atol=1e-12)
    assert value.to("cpu", torch.float32).dense().dtype == torch.float32


def test_factors_without_a_common_rank_are_refused() -> None:
    with pytest.raises(KernelError, match=r"\(80, 4\) and \(3, 48\) have no common rank"):
        LowRank(numbers(3, 48), numbers(80, 4))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("keep", ["memory", "block", "speed"])
@pytest.mark.parametrize("shape", [(48,), (2, 5, 48)])
def test_output_and_gradients_are_those_of_the_dense_layer(basis: str, keep: str, shape: tuple[int, ...]) -> None:
    weight, bias = numbers(80, 48), numbers(80, seed=1).requires_grad_()
    x = numbers(*shape, seed=2).requires_grad_()
    y = frozen_linear(x, base=weight, basis=basis, bias=bias, keep=keep)
    reached = weight @ dense(48).T if basis == "hadamard" else weight
    other_x, other_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    expected = other_x @ reached.T + other_bias
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = numbers(*y.shape, seed=3)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias.grad, other_bias.grad, rtol=1e-12, atol=1e-12)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes in which the frozen layer makes its codes dense."""
    made: list[torch.dtype] = []

    def counted(base: Codes, dtype: torch.dtype, **options: Any) -> Tensor:
        made.append(dtype)
        return dense_base(base, dtype, **options)

    monkeypatch.setattr("qwha_cli.kernels.low_rank.dense_base", counted)
    return made


def codes(out_features: int = 80, in_features: int = 48) -> Codes:
    return run_quantizer(numbers(out_features, in_features, dtype=torch.float32), None, options("rtn", 4)).as_codes()


@pytest.mark.parametrize(("keep", "saved", "calls"), [("memory", 0, 2), ("block", 80 * 48, 1), ("speed", 80 * 48, 1)])
def test_memory_keeps_nothing_of_the_weight_and_builds_it_again_the_others_keep_it(
    monkeypatch: pytest.MonkeyPatch, keep: str, saved: int, calls: int
) -> None:
    made = counting(monkeypatch)
    kept: list[int] = []
    x, base = numbers(4, 48, dtype=torch.float32).requires_grad_(), codes()
    # references, which cost nothing
    own = {tensor.data_ptr() for tensor in base.tensors}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = frozen_linear(x, base=base, basis="weight", bias=None, keep=keep)
    y.sum().backward()
    assert sum(kept) == saved
    assert made == [torch.float32] * calls


@pytest.mark.parametrize("keep", ["memory", "block"])
def test_without_a_gradient_to_give_the_backward_pass_builds_no_weight_and_none_is_kept(
    monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    made = counting(monkeypatch)
    kept: list[int] = []
    bias = numbers(80).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        y = frozen_linear(numbers(4, 48), base=codes(), basis="hadamard", bias=bias, keep=keep)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((80,), 4.0, dtype=torch.float64))
    assert (len(made), kept) == (1, [])


def test_under_checkpointing_block_builds_the_weight_in_both_forward_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base, found = codes(48, 48), {}
    made = counting(monkeypatch)
    for keep in ("memory", "block"):
        made.clear()
        x = numbers(4, 48, dtype=torch.float32).requires_grad_()

        def block(x: Tensor, keep: str = keep) -> Tensor:
            return frozen_linear(x, base=base, basis="hadamard", bias=None, keep=keep).square()

        checkpoint(block, x, use_reentrant=False).sum().backward()
        found[keep] = x.grad, len(made)
    assert torch.equal(found["memory"][0], found["block"][0])
    assert (found["memory"][1], found["block"][1]) == (3, 2)


@pytest.mark.parametrize("keep", ["memory", "block", "speed"])
def test_checkpointing_changes_no_gradient(keep: str) -> None:
    base, found = codes(48, 48), []

    def block(x: Tensor) -> Tensor:
        return frozen_linear(x, base=base, basis="hadamard", bias=None, keep=keep).square()

    for call in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        x = numbers(4, 48, dtype=torch.float32).requires_grad_()
        call(x).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)
