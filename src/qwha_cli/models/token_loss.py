"""The negative log-likelihood of labelled tokens, one value a token: the single definition behind training and every perplexity.

Labels follow the transformers convention: `labels[i]` is the token at place i, -100 where nothing is asked. The prediction for
place i is read off place i - 1, so the label at place 0 is never scored. The vocabulary product, the widest matrix of a small
model, runs only at places where some row of the batch has a label, and the softmax in fp32 only on labelled tokens.

Does not reduce: sums, means and their normalisation belong to the callers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qwha_cli.models.liger import FusedHead

IGNORED = -100


@dataclass(frozen=True)
class TokenLosses:
    """The losses of one batch.

    Attributes:
        losses: (n,) fp32, nats, one entry a labelled token, differentiable.
        rows: (n,) int64, the batch row each of them belongs to.
    """

    losses: Tensor
    rows: Tensor


def accepts_logits_to_keep(model: nn.Module) -> bool:
    """Whether the causal model under any wrapper (peft, DistributedDataParallel) can compute logits at chosen places only."""
    forward = getattr(causal_model(model), "forward")  # noqa: B009 - typed as Any on purpose
    return "logits_to_keep" in inspect.signature(forward).parameters


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers under its wrappers (peft, DistributedDataParallel)."""
    inner: object = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    get_base_model = getattr(inner, "get_base_model", None)
    return cast(PreTrainedModel, get_base_model() if callable(get_base_model) else inner)


def token_losses(model: nn.Module, batch: Mapping[str, Tensor], *, narrow: bool | None = None) -> TokenLosses:
    """Run the model on a batch and return the loss of each labelled token.

    Args:
        model: A causal language model of transformers, possibly wrapped.
        batch: `input_ids` (rows, length) int64, `labels` of the same shape, and whatever else the forward takes
            (`attention_mask`, `position_ids`), all on the model's device.
        narrow: Compute logits only where needed. None asks the model's signature; False forces full logits (the same numbers).

    Returns:
        The losses in row-major order of the labels.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    if narrow is None:
        narrow = accepts_logits_to_keep(model)
    if narrow:
        places = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
        logits: Tensor = model(**inputs, logits_to_keep=places, use_cache=False).logits
        targets = targets[:, places]
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    labelled = targets != IGNORED
    # fp32: a bf16 log-softmax over 50k to 250k words loses the third digit of the loss.
    losses = functional.cross_entropy(logits[labelled].float(), targets[labelled], reduction="none")
    return TokenLosses(losses=losses, rows=labelled.nonzero()[:, 0])


def summed_loss(model: nn.Module, batch: Mapping[str, Tensor], *, head: FusedHead | None) -> Tensor:
    """The sum of `token_losses` over a batch.

    Args:
        model: As for `token_losses`.
        batch: As for `token_losses`.
        head: What stands in the place of the model's head, if something does: then logits are never made.

    Returns:
        float32 scalar, nats; differentiable.
    """
    if head is None:
        return token_losses(model, batch).losses.sum()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    hidden: Tensor = model(**inputs, use_cache=False).logits[:, :-1]
    labelled = targets != IGNORED
    return head.summed_loss(hidden[labelled], targets[labelled])


def count_labelled(labels: Tensor) -> int:
    """How many tokens of `labels` (rows, length) are scored; the first place has no prediction."""
    return int(torch.count_nonzero(labels[:, 1:] != IGNORED))
