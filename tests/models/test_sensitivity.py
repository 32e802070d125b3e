"""Squared gradients of the loss by token, measured a block at a time, against plain autograd through the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwha_cli.artifacts.tensors import read_tensors, write_tensors
from qwha_cli.models import sensitivity as module
from qwha_cli.models.gram import GramAccumulator
from qwha_cli.models.random import random_model
from qwha_cli.models.sensitivity import Sensitivity, measure_sensitivity
from qwha_cli.models.stream import open_model

TOKENS = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1))


def measured(**changes: object) -> Sensitivity:
    model = random_model("tiny-llama", dtype=torch.float32, seed=0).eval()
    settings: dict[str, object] = {"device": "cpu", "batch_size": 2, "dtype": torch.float32, **changes}
    return measure_sensitivity(model, TOKENS, **settings)  # pyright: ignore[reportArgumentType]


def by_autograd() -> dict[str, Tensor]:
    """The squares of every linear layer and block, from one backward pass a sample through the whole model."""
    model = random_model("tiny-llama", dtype=torch.float32, seed=0).eval()
    squares: dict[str, list[Tensor]] = {}

    def watch(name: str) -> object:
        def hook(owner: nn.Module, inputs: object, output: Tensor) -> None:
            output.register_hook(lambda g: squares.setdefault(name, []).append(g.square().mean(-1)) and None)

        return hook

    for name, part in model.named_modules():
        if name.startswith("model.layers.") and (isinstance(part, nn.Linear) or name.count(".") == 2):
            part.register_forward_hook(watch(name))  # pyright: ignore[reportArgumentType]
    for row in TOKENS:
        inputs = model.model.embed_tokens(row[None]).detach().requires_grad_()
        logits = model(inputs_embeds=inputs).logits
        F.cross_entropy(logits[0, :-1], row[1:], reduction="sum").backward()
    return {name: torch.cat(parts) for name, parts in squares.items()}


@pytest.mark.parametrize("waiting", [1, 1 << 30])
def test_every_layers_and_blocks_squares_are_those_of_autograd_in_one_chunk_or_many(
    monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    monkeypatch.setattr(module, "_WAITING_BYTES", waiting)
    found, expected = measured(), by_autograd()
    assert set(found.tokens) == set(expected)
    assert len(expected) == 2 * 7 + 2
    for name, squares in expected.items():
        torch.testing.assert_close(found.tokens[name] * found.means[name], squares, rtol=1e-4, atol=1e-10)
        assert float(found.tokens[name].mean()) == pytest.approx(1, rel=1e-4)


def test_a_model_read_from_files_gives_the_same_and_is_a_skeleton_again_afterwards(tmp_path: Path) -> None:
    model = random_model("tiny-llama", dtype=torch.float32, seed=0)
    model.save_pretrained(tmp_path)
    from qwha_cli.models.random import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), dtype=None)
    assert not opened.resident
    found = measure_sensitivity(opened.model, TOKENS, device="cpu", batch_size=2, dtype=torch.float32, weights=opened.weights)
    expected = measured()
    assert all(torch.equal(found.tokens[name], tokens) for name, tokens in expected.tokens.items())
    assert all(parameter.is_meta for parameter in opened.model.parameters())


def test_progress_goes_there_and_back() -> None:
    steps: list[tuple[int, int]] = []
    measured(progress=lambda done, total: steps.append((done, total)))
    assert steps == [(n, 4) for n in (1, 2, 3, 4)]


def test_a_file_keeps_it(tmp_path: Path) -> None:
    found = measured()
    write_tensors(tmp_path / "x.safetensors", found.to_tensors())
    back = Sensitivity.from_tensors(read_tensors(tmp_path / "x.safetensors"))
    assert back.means == found.means
    assert all(torch.equal(back.tokens[name], tokens.bfloat16().float()) for name, tokens in found.tokens.items())


def test_weighted_grams_are_weighted_sums_and_layers_with_one_input_share_the_mean_of_their_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = nn.Linear(6, 4), nn.Linear(6, 3)
    other = nn.Linear(4, 2)
    inputs = torch.randn(3, 5, 6, generator=generator)
    weights = {name: torch.rand(3, 5, generator=generator) for name in ("a", "b", "c")}
    with GramAccumulator({"a": first, "b": second, "c": other}, dtype=torch.float64, token_weights=weights) as accumulator:
        for batch in inputs.split([2, 1]):
            second(batch)
            other(first(batch))
            accumulator.next_batch()
        grams = accumulator.result()
    assert grams["a"] is grams["b"]
    assert grams["a"] is not grams["c"]
    shared = ((weights["a"] + weights["b"]) / 2).double().reshape(-1)
    flat = inputs.double().reshape(-1, 6)
    torch.testing.assert_close(grams["a"].matrix, flat.T @ (shared[:, None] * flat), rtol=1e-6, atol=1e-6)
    hidden = first(inputs).detach().double().reshape(-1, 4)
    torch.testing.assert_close(
        grams["c"].matrix, hidden.T @ (weights["c"].double().reshape(-1, 1) * hidden), rtol=1e-6, atol=1e-6
    )
