"""The one definition of a token's loss: narrow logits and full logits are the same numbers with the same gradients."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qwha_cli.data.collate import pad_batch
from qwha_cli.data.tokenize import Encoded
from qwha_cli.models.token_loss import accepts_logits_to_keep, count_labelled, token_losses
from support.tiny_model import tiny_llama, tiny_qwen2


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, answer in ((5, 3), (1, 9), (0, 4)):
        ids = torch.randint(0, 256, (prompt + answer,), generator=generator).tolist()
        rows.append(Encoded(input_ids=ids, labels=[-100] * prompt + ids[prompt:]))
    return pad_batch(rows, pad_id=256)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2])
def test_narrow_logits_give_the_losses_and_gradients_of_full_logits(build: type) -> None:
    model = build()
    found: list[tuple[Tensor, Tensor]] = []
    for narrow in (True, False):
        model.zero_grad()
        losses = token_losses(model, batch(), narrow=narrow)
        losses.losses.sum().backward()
        found.append((losses.losses.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_the_sum_is_that_of_the_models_own_loss() -> None:
    model, data = tiny_llama(), batch()
    losses = token_losses(model, data).losses
    own = model(**data).loss
    assert losses.numel() == count_labelled(data["labels"]) == 3 + 9 + 3
    torch.testing.assert_close(losses.mean(), own, rtol=1e-5, atol=1e-6)


def test_rows_say_whose_token_each_loss_is() -> None:
    model, data = tiny_llama(), batch()
    found = token_losses(model, data)
    for row in range(3):
        alone = token_losses(model, {name: tensor[row : row + 1] for name, tensor in data.items()})
        torch.testing.assert_close(found.losses[found.rows == row], alone.losses, rtol=1e-5, atol=1e-5)


def test_the_question_is_asked_of_the_model_inside_peft() -> None:
    assert accepts_logits_to_keep(tiny_llama())
    assert accepts_logits_to_keep(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])))
    assert not accepts_logits_to_keep(nn.Linear(2, 2))
