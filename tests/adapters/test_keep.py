"""How long dense weights stay: as asked, or as long as they take a quarter of what a GPU has free; and what that changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwha_cli.adapters.adapted_linear import adapted_layers
from qwha_cli.adapters.build import add_adapter
from qwha_cli.adapters.keep import choose_keep, set_keep
from qwha_cli.kernels import spectral_linear
from qwha_cli.models.token_loss import causal_model
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import Basis
from qwha_cli.quant.swap import replace
from support.adapted import quantize_linear, random_sparse
from support.quantized import gaussian, options, run_quantizer
from support.tiny_model import tiny_llama

CUDA = torch.device("cuda")


def packed(out_features: int) -> nn.Module:
    layer = QuantizedLinear.from_packed(run_quantizer(gaussian(out_features, 64), None, options("rtn", 2, 16)))
    return nn.Sequential(layer, nn.Linear(96, 96))


def model() -> nn.Sequential:
    return nn.Sequential(packed(32), packed(64))


# in bfloat16, of both layers and of the larger; what is not packed does not count
DENSE, LARGER = 96 * 64 * 2, 64 * 64 * 2


@pytest.mark.parametrize(
    ("free", "unused", "recomputed", "keep"),
    [
        (4 * DENSE, 0, False, "speed"),
        (3 * DENSE, DENSE, False, "speed"),
        (4 * DENSE - 1, 0, False, "memory"),
        (4 * DENSE, 0, True, "speed"),
        (4 * DENSE - 1, 0, True, "block"),
        (3 * LARGER, LARGER, True, "block"),
        (4 * LARGER - 1, 0, True, "memory"),
    ],
)
def test_a_gpu_keeps_those_for_which_it_has_four_times_the_room(
    monkeypatch: pytest.MonkeyPatch, free: int, unused: int, recomputed: bool, keep: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 + unused)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    whole = model()
    blocks = list(whole) if recomputed else []
    choice = choose_keep("auto", whole, dtype=torch.bfloat16, device=CUDA, recomputed=blocks)
    assert choice.keep == keep
    assert "GiB free" in choice.reason


def test_a_cpu_makes_them_again_and_what_the_recipe_asks_for_is_done() -> None:
    whole = model()
    assert choose_keep("auto", whole, dtype=torch.float32, device=torch.device("cpu"), recomputed=list(whole)).keep == "memory"
    for asked in ("memory", "block", "speed"):
        choice = choose_keep(asked, whole, dtype=torch.float32, device=CUDA, recomputed=list(whole))
        assert choice.keep == asked
        assert "as the recipe asks" in choice.reason


def test_a_split_base_has_its_weights_made_for_each_pass_and_says_why() -> None:
    whole = model()
    how = {"dtype": torch.float32, "device": CUDA, "recomputed": list(whole), "split": True}
    choice = choose_keep("auto", whole, **how)  # pyright: ignore
    assert choice.keep == "memory"
    assert "a split base" in choice.reason
    assert choose_keep("block", whole, **how).keep == "block"  # pyright: ignore


def test_block_is_memory_where_nothing_is_recomputed_and_says_so() -> None:
    choice = choose_keep("block", model(), dtype=torch.float32, device=CUDA)
    assert choice.keep == "memory"
    assert "without train.checkpointing" in choice.reason


def adapted(basis: Basis) -> nn.Module:
    found = tiny_llama()
    layers = {name: module for name, module in found.named_modules() if isinstance(module, nn.Linear) and "layers" in name}
    for name, module in layers.items():
        replace(found, name, quantize_linear(module, basis))
    start = {name: random_sparse((x.out_features, x.in_features), seed=i) for i, (name, x) in enumerate(layers.items())}
    return add_adapter(found, rank=4, scale=1.0, targets=list(start), start=start, store="float32")


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
def test_with_checkpointing_a_block_builds_each_weight_twice_and_gives_the_gradients_of_memory(
    monkeypatch: pytest.MonkeyPatch, basis: Basis
) -> None:
    made: list[object] = []
    build = spectral_linear.build_weight
    monkeypatch.setattr(spectral_linear, "build_weight", lambda *a: made.append(a) or build(*a))
    whole = adapted(basis)
    layers = adapted_layers(whole)
    causal_model(whole).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(12).view(2, 6)
    found: dict[str, list[torch.Tensor]] = {}
    counts: dict[str, int] = {}
    for keep in ("memory", "block"):
        set_keep(whole, keep)
        whole.zero_grad()
        made.clear()
        whole.train()(ids, labels=ids).loss.backward()
        counts[keep] = len(made)
        found[keep] = [layer.qwha_values["default"].grad.clone() for layer in layers.values()]
        with torch.no_grad():
            made.clear()
            whole.eval()(ids, labels=ids)
        assert len(made) == len(layers)
    assert all(torch.equal(one, other) for one, other in zip(found["memory"], found["block"], strict=True))
    # the last product of a block is not computed again; "block" has made its weight by then, and the backward pass needs it
    blocks = whole.config.num_hidden_layers
    assert counts == {"memory": 3 * len(layers) - blocks, "block": 2 * len(layers)}
