"""The shared transform: once for several readers, anew when it must be, gone with its input."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from qwha_cli.kernels import shared_wht as module
from qwha_cli.kernels.shared_wht import shared_wht
from qwha_cli.kernels.wht import wht


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was transformed by the shared form."""
    seen: list[Tensor] = []

    def counted(x: Tensor, **settings: object) -> Tensor:
        seen.append(x.detach())
        return wht(x, **settings)

    monkeypatch.setattr(module, "wht", counted)
    return seen


def test_three_readers_cost_one_transform_and_their_gradients_add_up(calls: list[Tensor]) -> None:
    leaf = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    x = leaf * 1.0
    weights = [torch.randn(48, dtype=torch.float64) for _ in range(3)]
    sum((shared_wht(x) * weight).sum() for weight in weights).backward()
    assert len(calls) == 1
    assert torch.allclose(leaf.grad, wht(sum(weights).expand(4, -1), transpose=True), atol=1e-12)
    assert shared_wht(x) is shared_wht(x)


def test_a_leaf_that_needs_a_gradient_is_right_too() -> None:
    x = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    (shared_wht(x) + shared_wht(x)).sum().backward()
    assert torch.allclose(x.grad, wht(torch.full_like(x, 2), transpose=True), atol=1e-12)


def test_a_change_of_the_numbers_and_another_dtype_are_transformed_anew(calls: list[Tensor]) -> None:
    x = torch.randn(4, 48)
    before = shared_wht(x).clone()
    x.mul_(2)
    assert torch.allclose(shared_wht(x), 2 * before)
    assert shared_wht(x, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(shared_wht(x, dtype=torch.bfloat16), wht(x.bfloat16()))
    assert len(calls) == 3


def test_a_result_without_graph_is_not_given_to_who_needs_one(calls: list[Tensor]) -> None:
    x = torch.randn(4, 48, requires_grad=True) * 1.0
    with torch.no_grad():
        assert not shared_wht(x).requires_grad
    assert shared_wht(x).requires_grad
    with torch.no_grad():
        assert not shared_wht(x).requires_grad
    assert len(calls) == 3


def test_a_result_of_inference_mode_does_not_reach_training(calls: list[Tensor]) -> None:
    x = torch.randn(4, 48)
    with torch.inference_mode():
        assert shared_wht(x) is shared_wht(x)
    weight = torch.randn(48, requires_grad=True)
    (shared_wht(x) * weight).sum().backward()
    assert weight.grad is not None
    assert len(calls) == 2
    with torch.inference_mode():
        y = torch.randn(4, 48)
        assert shared_wht(y) is shared_wht(y)
    assert len(calls) == 3


@pytest.mark.parametrize("kind", ["leaf", "no gradient", "inner"])
def test_the_result_ends_with_its_input(kind: str) -> None:
    gc.disable()
    try:
        x = torch.randn(4, 48, requires_grad=kind != "no gradient")
        x = x * 1.0 if kind == "inner" else x
        result = weakref.ref(shared_wht(x))
        own = weakref.ref(x)
        assert (result() is None) == (kind == "leaf")
        del x
        assert own() is None
        assert result() is None
    finally:
        gc.enable()
