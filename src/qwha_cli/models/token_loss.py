"""The negative log-likelihood of labelled tokens, one value a token: the single definition behind training and every perplexity.

Labels follow the transformers convention: `labels[i]` is the token at place i, -100 where nothing is asked. The prediction for
place i is read off place i - 1, so the label at place 0 is never scored. The vocabulary product, the widest matrix of a small
model, runs only at places where some row of the batch has a label, and the softmax in fp32 only on labelled tokens.

A flat batch (`data/flatten.py`, `models/varlen.py`) brings `places` and `targets` instead of labels: which tokens are scored was
worked out where it was made, so `summed_loss` never waits for the device that the batch is on.

Does not reduce: means and their normalisation belong to the callers.
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
        rows: (n,) int64, the batch row each of them belongs to; the sequence, if the batch is flat.
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


def token_losses(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    narrow: bool | None = None,
    longest: int | None = None,
    equal: int | None = None,
) -> TokenLosses:
    """Run the model on a batch and return the loss of each labelled token.

    Args:
        model: A causal language model of transformers, possibly wrapped.
        batch: `input_ids` (rows, length) int64, `labels` of the same shape, and whatever else the forward takes
            (`attention_mask`, `position_ids`), all on the model's device. Or a flat batch.
        narrow: Compute logits only where needed. None asks the model's signature; False forces full logits (the same numbers).
        longest: Of a flat batch, and only of one: most tokens that a sequence may have.
        equal: Of a flat batch: the length of all sequences, where it is known to be the same; attention is faster then.

    Returns:
        The losses in row-major order of the labels.
    """
    if "cu_seq_lens" in batch:
        logits, targets = _flat_logits(model, batch, narrow=narrow, lengths=(longest, equal))
        scored = targets != IGNORED
        losses = functional.cross_entropy(logits[scored].float(), targets[scored], reduction="none")
        ends = batch["cu_seq_lens"][1:]
        return TokenLosses(losses, rows=torch.searchsorted(ends, batch["places"][scored].to(ends.dtype), right=True))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    if narrow is None:
        narrow = accepts_logits_to_keep(model)
    if narrow:
        places = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
        logits = model(**inputs, logits_to_keep=places, use_cache=False).logits
        targets = targets[:, places]
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    labelled = targets != IGNORED
    # fp32: a bf16 log-softmax over 50k to 250k words loses the third digit of the loss.
    losses = functional.cross_entropy(logits[labelled].float(), targets[labelled], reduction="none")
    return TokenLosses(losses=losses, rows=labelled.nonzero()[:, 0])


def summed_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    head: FusedHead | None,
    longest: int | None = None,
    equal: int | None = None,
) -> Tensor:
    """The sum of `token_losses` over a batch.

    Args:
        model: As for `token_losses`.
        batch: As for `token_losses`.
        head: What stands in the place of the model's head, if something does: then logits are never made.
        longest: As for `token_losses`.
        equal: As for `token_losses`.

    Returns:
        float32 scalar, nats; differentiable.
    """
    if "cu_seq_lens" in batch:
        if head is None:
            logits, targets = _flat_logits(model, batch, narrow=None, lengths=(longest, equal))
            return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        states: Tensor = model(**_flat_inputs(batch, longest, equal)).logits
        return head.summed_loss(states.squeeze(0).index_select(0, batch["places"]), batch["targets"])
    if head is None:
        return token_losses(model, batch).losses.sum()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    hidden: Tensor = model(**inputs, use_cache=False).logits[:, :-1]
    labelled = targets != IGNORED
    return head.summed_loss(hidden[labelled], targets[labelled])


def _flat_logits(
    model: nn.Module, batch: Mapping[str, Tensor], *, narrow: bool | None, lengths: tuple[int | None, int | None]
) -> tuple[Tensor, Tensor]:
    """The logits (L, words) at a flat batch's places, and its targets (L,)."""
    inputs, places = _flat_inputs(batch, *lengths), batch["places"]
    if accepts_logits_to_keep(model) if narrow is None else narrow:
        logits: Tensor = model(**inputs, logits_to_keep=places).logits.squeeze(0)
    else:
        logits = model(**inputs).logits.squeeze(0).index_select(0, places)
    return logits, batch["targets"]


def _flat_inputs(batch: Mapping[str, Tensor], longest: int | None, equal: int | None) -> dict[str, object]:
    """What the forward of a model takes of a flat batch, under transformers' names."""
    assert longest is not None, "a flat batch has to be run with the length that its sequences keep to"
    lengths = batch["cu_seq_lens"]
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
        **({} if equal is None else {"equal_length": equal}),
    }


def count_labelled(labels: Tensor) -> int:
    """How many tokens of `labels` (rows, length) are scored; the first place has no prediction."""
    return int(torch.count_nonzero(labels[:, 1:] != IGNORED))
