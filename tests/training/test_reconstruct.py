"""Block-wise reconstruction on a tiny model: the error is what it says, training lowers it, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwha_cli.kernels.wht import wht
from qwha_cli.models.targets import decoder_blocks, find_targets
from qwha_cli.models.walk import Block, Original, walk
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.swap import get_linear, replace
from qwha_cli.quant.trainable import TrainableQuantizedLinear
from qwha_cli.training.reconstruct import Reconstruction
from support.quantized import options, run_quantizer
from support.tiny_model import tiny_llama

Parameters = Iterable[tuple[nn.Parameter, float]]
Rates = list[tuple[nn.Parameter, float]]
# five samples, two a batch: the last batch is smaller
TOKENS = torch.randint(3, 250, (5, 16), generator=torch.Generator().manual_seed(1))


def block_error(block: Block, token_weights: Tensor | None = None) -> float:
    return Reconstruction(block, token_weights).error()


def reconstruct(block: Block, parameters: Parameters, *, epochs: int, seed: int, token_weights: Tensor | None = None) -> None:
    Reconstruction(block, token_weights).train(parameters, epochs=epochs, seed=seed)


def blocks(model: PreTrainedModel, tokens: Tensor = TOKENS, dtype: torch.dtype = torch.float32) -> Iterator[Block]:
    return walk(model, tokens, device="cpu", batch_size=2, dtype=dtype, original=Original(model))


def linears(model: PreTrainedModel, block: Block) -> list[str]:
    return [target.name for target in find_targets(model) if target.block == block.index]


def quantized(model: PreTrainedModel, block: Block, basis: str = "hadamard") -> dict[str, tuple[QuantizedLinear, Tensor]]:
    """Round the block's layers to 2 bits, and give back each with its weight in the codes' basis."""
    found: dict[str, tuple[QuantizedLinear, Tensor]] = {}
    for name in linears(model, block):
        weight = get_linear(model, name).weight.detach().float()
        weight = wht(weight) if basis == "hadamard" else weight
        layer = QuantizedLinear.from_packed(run_quantizer(weight, None, options("rtn", 2, 16, basis, zeros="fine"), name))
        replace(model, name, layer)
        found[name] = layer, weight
    return found


def trainable(
    model: PreTrainedModel, layers: dict[str, tuple[QuantizedLinear, Tensor]], *, rounding: bool
) -> dict[str, TrainableQuantizedLinear]:
    """Put the trainable forms of quantized layers into their places."""
    found: dict[str, TrainableQuantizedLinear] = {}
    for name, (layer, weight) in layers.items():
        found[name] = TrainableQuantizedLinear(layer, weight=weight if rounding else None)
        replace(model, name, found[name])
    return found


def rates(layers: dict[str, TrainableQuantizedLinear], grid: float = 1e-2, rounding: float = 2e-2) -> Rates:
    return [pair for layer in layers.values() for pair in layer.learning_rates(grid=grid, rounding=rounding)]


def explicit_error(block: Block, token_weights: Tensor | None = None) -> float:
    with torch.no_grad():
        outputs = torch.cat([block.forward(batch).double() for batch in range(len(block.targets))])
    targets = torch.cat(block.targets).double()
    counts = torch.ones(targets.shape[:2]) if token_weights is None else token_weights
    share = [(counts.double().unsqueeze(-1) * values.square()).sum() for values in (outputs - targets, targets)]
    return float(share[0] / share[1])


def test_an_unchanged_block_has_no_error() -> None:
    seen = 0
    for block in blocks(tiny_llama()):
        assert 0 <= block_error(block) < 1e-12
        seen += 1
    assert seen == 3


def test_the_error_is_the_share_of_the_targets_energy_over_all_batches() -> None:
    model = tiny_llama()
    block = next(blocks(model))
    quantized(model, block)
    sizes = [len(target) for target in block.targets]
    assert sizes == [2, 2, 1]
    block.hidden_states[0].mul_(30)  # batches of unlike errors: a mean of shares would be something else
    assert block_error(block) == pytest.approx(explicit_error(block), rel=1e-5)


def test_the_error_of_a_later_block_counts_what_earlier_ones_lost() -> None:
    model = tiny_llama()
    steps = blocks(model)
    quantized(model, next(steps))
    second = next(steps)
    assert block_error(second) > 1e-3  # though this block is as it was
    assert block_error(second) == pytest.approx(explicit_error(second), rel=1e-5)


def test_tokens_count_by_their_weights() -> None:
    model = tiny_llama()
    block = next(blocks(model))
    quantized(model, block)
    weights = torch.rand(5, 16, generator=torch.Generator().manual_seed(2)) ** 4
    assert block_error(block, weights) == pytest.approx(explicit_error(block, weights), rel=1e-5)
    assert block_error(block, weights) != pytest.approx(block_error(block), rel=1e-3)
    assert block_error(block, torch.ones(5, 16)) == pytest.approx(block_error(block), rel=1e-6)


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
@pytest.mark.parametrize("rounding", [False, True])
def test_quantizing_a_block_raises_its_error_and_reconstruction_lowers_it(basis: str, rounding: bool) -> None:
    model = tiny_llama()
    for block in blocks(model):
        layers = quantized(model, block, basis)
        before = block_error(block)
        assert before > 1e-2
        trained = trainable(model, layers, rounding=rounding)
        assert block_error(block) == pytest.approx(before, rel=1e-4)
        reconstruct(block, rates(trained), epochs=6, seed=0)
        after = block_error(block)
        assert after < 0.9 * before
        # and so it does when it is stored
        for name, layer in trained.items():
            replace(model, name, QuantizedLinear.from_packed(layer.packed()))
        assert block_error(block) == pytest.approx(after, rel=1e-2)


def test_a_block_makes_up_for_what_earlier_ones_lost() -> None:
    model = tiny_llama()
    steps = blocks(model)
    quantized(model, next(steps))
    second = next(steps)
    before = block_error(second)
    weights = [(get_linear(model, name).weight, 1e-3) for name in linears(model, second)]
    reconstruct(second, weights, epochs=6, seed=0)
    assert block_error(second) < 0.9 * before


def test_the_next_block_sees_the_reconstructed_one() -> None:
    model = tiny_llama()
    steps = blocks(model)
    first = next(steps)
    reconstruct(first, rates(trainable(model, quantized(model, first), rounding=False)), epochs=2, seed=0)
    with torch.no_grad():
        expected = [first.forward(batch) for batch in range(3)]
    second = next(steps)
    assert all(torch.equal(a, b) for a, b in zip(second.hidden_states, expected, strict=True))


def _trained(seed: int, tokens: Tensor = TOKENS, **more: Tensor) -> dict[str, Tensor]:
    model = tiny_llama()
    block = next(blocks(model, tokens))
    layers = trainable(model, quantized(model, block), rounding=True)
    reconstruct(block, rates(layers), epochs=2, seed=seed, **more)
    return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}


def test_one_seed_gives_one_result_to_the_bit_and_another_seed_another() -> None:
    one, again, other = _trained(3), _trained(3), _trained(5)
    assert len(one) == 3 * 7
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_what_a_token_without_weight_says_is_not_learnt() -> None:
    weights = torch.rand(5, 16, generator=torch.Generator().manual_seed(2))
    weights[[1, 4]] = 0  # one of two in its batch, and one that is a batch by itself
    other = TOKENS.clone()
    other[[1, 4]] = other[[1, 4]].flip(1)
    assert not torch.equal(other, TOKENS)
    # a quarter is exact in binary: weights count relative to each other only
    one, same = _trained(3, token_weights=weights), _trained(3, other, token_weights=weights / 4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    plain, changed = _trained(3), _trained(3, other)
    assert not any(torch.equal(one[name], plain[name]) for name in one if name.endswith("scale_change"))
    assert not all(torch.equal(plain[name], changed[name]) for name in one)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(11)
    one, state = _trained(3), torch.random.get_rng_state()
    torch.manual_seed(12)
    other = _trained(3)
    assert all(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(11)
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_was_not_handed_in_does_not_change_and_gets_no_gradient() -> None:
    model = tiny_llama()
    block = next(blocks(model))
    layers = trainable(model, quantized(model, block), rounding=True)
    handed = {id(layer.scale_change) for layer in layers.values()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reconstruct(block, [(layer.scale_change, 1e-2) for layer in layers.values()], epochs=2, seed=0)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"{name}.scale_change" for name in layers}
    for parameter in model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in handed)
    # norms and, in other layers, zeros and roundings: all were there to be trained
    own = [name for name, _ in block.module.named_parameters()]
    assert len(own) == 2 + 3 * 7
    assert {id(p) for p in block.module.parameters() if p.requires_grad} == handed


def test_frozen_parameters_that_are_handed_in_are_trained() -> None:
    model = tiny_llama()
    block = next(blocks(model))
    quantized(model, block)
    norm = decoder_blocks(model)[0][1].get_submodule("input_layernorm").weight
    norm.requires_grad_(False)
    before = norm.detach().clone()
    with torch.no_grad():  # as the stages call it, or not
        reconstruct(block, [(norm, 1e-2)], epochs=2, seed=0)
    assert not torch.equal(norm, before)


def test_each_parameter_moves_at_its_own_rate() -> None:
    model = tiny_llama()
    block = next(blocks(model, TOKENS[:2]))  # one batch: one step, at the peak
    layers = trainable(model, quantized(model, block), rounding=True)
    old = {name: layer.rounding.detach().clone() for name, layer in layers.items()}
    reconstruct(block, rates(layers, grid=2e-3, rounding=7e-3), epochs=1, seed=0)
    for name, layer in layers.items():
        # Adam's first step is the rate itself wherever there is a gradient to speak of
        assert float(layer.scale_change.detach().abs().max()) == pytest.approx(2e-3, rel=1e-2)
        assert float((layer.rounding.detach() - old[name]).abs().max()) == pytest.approx(7e-3, rel=1e-2)


def test_every_epoch_passes_over_every_batch_once_in_an_order_of_its_own() -> None:
    model = tiny_llama()
    tokens = TOKENS.repeat(3, 1)[:14]  # seven batches
    tokens[:, 0] = torch.arange(14) + 3
    block = next(blocks(model, tokens))
    layers = trainable(model, quantized(model, block), rounding=False)
    batches = {float(hidden.double().sum()): index for index, hidden in enumerate(block.hidden_states)}
    assert len(batches) == 7
    order: list[int] = []
    handle = block.module.register_forward_pre_hook(lambda _m, args: order.append(batches[float(args[0].double().sum())]))
    reconstruct(block, rates(layers), epochs=3, seed=0)
    handle.remove()
    epochs = [order[start : start + 7] for start in (0, 7, 14)]
    assert len(order) == 21
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_measuring_keeps_no_graph_and_changes_nothing() -> None:
    model = tiny_llama()
    block = next(blocks(model))
    layers = trainable(model, quantized(model, block), rounding=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = block_error(block)
    assert block_error(block) == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for layer in layers.values() for parameter in layer.parameters())


def test_a_bfloat16_walk_is_reconstructed_under_autocast() -> None:
    model = tiny_llama().to(torch.bfloat16)
    block = next(blocks(model, dtype=torch.bfloat16))
    layers = trainable(model, quantized(model, block), rounding=True)
    before = block_error(block)
    assert block.targets[0].dtype == torch.bfloat16
    reconstruct(block, rates(layers), epochs=6, seed=0)
    assert block_error(block) < 0.9 * before
    assert all(parameter.dtype == torch.float32 for layer in layers.values() for parameter in layer.parameters())
