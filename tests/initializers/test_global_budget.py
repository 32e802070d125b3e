"""Sharing one budget among layers: counts above a threshold that add up, against sorting all gains of all layers."""

from __future__ import annotations

import pytest
import torch

from qwha_cli.errors import NumericsError
from qwha_cli.initializers.global_budget import Gains, measure_gains, share_globally

SHAPES = {"a": (40, 48), "b": (24, 80), "c": (64, 20)}


def layers() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    deltas, grams = {}, {}
    for number, (name, (out, inside)) in enumerate(SHAPES.items()):
        x = torch.randn(300, inside, generator=generator)
        grams[name] = x.T @ x
        deltas[name] = torch.randn(out, inside, generator=generator) * 2.0**number
    return deltas, grams


def exact_gains(delta: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    return ((delta @ gram).square() / gram.diagonal()).flatten()


def test_the_histogram_counts_every_place_in_its_bin() -> None:
    deltas, grams = layers()
    for name, delta in deltas.items():
        gains, exact = measure_gains(delta, grams[name]), exact_gains(delta, grams[name])
        assert sum(gains.counts) == delta.numel()
        for bin_number in (0, 7, len(gains.counts) - 1):
            low, high = (2.0 ** ((gains.first + bin_number + more) / 4) for more in (0, 1))
            assert gains.counts[bin_number] == int(((exact >= low) & (exact < high)).sum())
        edge = (gains.first + 9) / 4
        assert gains.above(edge) == int((exact >= 2.0**edge).sum())
        assert Gains.from_json(gains.to_json()) == Gains(gains.first, list(gains.counts))


def test_an_error_of_zero_has_no_gains() -> None:
    assert measure_gains(torch.zeros(3, 4), torch.eye(4)).counts == ()
    assert Gains(0, ()).above(-5.0) == 0


@pytest.mark.parametrize("total", [200, 700, 2500, 4800])
def test_layers_get_about_as_many_entries_as_they_have_among_the_largest_gains_of_all(total: int) -> None:
    deltas, grams = layers()
    costs = {"a": 1.0, "b": 3.0, "c": 0.01}
    gains = {name: measure_gains(delta, grams[name]) for name, delta in deltas.items()}
    least = {name: 2 * out for name, (out, _) in SHAPES.items()}
    most = {name: out * inside for name, (out, inside) in SHAPES.items()}
    if total < sum(least.values()):
        with pytest.raises(NumericsError, match="does not fit 3 layers"):
            share_globally(gains, costs, total=total, least=least, most=most)
        return
    found = share_globally(gains, costs, total=total, least=least, most=most)
    assert sum(found.values()) == total
    assert all(least[name] <= found[name] <= most[name] for name in SHAPES)
    weighted = {name: exact_gains(delta, grams[name]) * costs[name] for name, delta in deltas.items()}
    free = [name for name in SHAPES if least[name] < found[name] < most[name]]
    threshold = torch.cat([weighted[name] for name in free]).sort(descending=True).values[sum(found[n] for n in free) - 1]
    for name in free:
        assert found[name] == pytest.approx(int((weighted[name] >= threshold).sum()), rel=0.03, abs=4)


def test_the_whole_model_can_be_taken_and_a_dearer_layer_gets_more() -> None:
    deltas, grams = layers()
    gains = {name: measure_gains(delta, grams[name]) for name, delta in deltas.items()}
    least, most = dict.fromkeys(SHAPES, 0), {name: out * inside for name, (out, inside) in SHAPES.items()}
    everything = share_globally(gains, dict.fromkeys(SHAPES, 1.0), total=sum(most.values()), least=least, most=most)
    assert everything == most
    even = share_globally(gains, dict.fromkeys(SHAPES, 1.0), total=2000, least=least, most=most)
    dear = share_globally(gains, {"a": 100.0, "b": 1.0, "c": 1.0}, total=2000, least=least, most=most)
    assert dear["a"] > even["a"]
    nothing = share_globally(gains, {"a": 0.0, "b": 1.0, "c": 1.0}, total=2000, least=least, most=most)
    assert nothing["a"] == 0
