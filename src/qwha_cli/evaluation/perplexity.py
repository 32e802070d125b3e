"""Perplexity of running text by a sliding window, and the score that every measurement of this package returns.

    perplexity = exp( sum over scored tokens of -log p(token | up to `window` - 1 tokens before it) / number of scored tokens )

The text is tokenized as a whole. The first window scores all of its tokens but the very first, each further window the `stride`
tokens that no window before it has scored, with what precedes them in the window as context. With stride == window this is the
customary perplexity over separate windows, in which the first token of every window has no context and is not scored; with a
smaller stride every token but the first of the text is scored exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qwha_cli.errors import DataError, NumericsError, UsageError
from qwha_cli.models.token_loss import IGNORED, token_losses


@dataclass(frozen=True)
class Score:
    """A measured number and how sure it is.

    Attributes:
        value: The number.
        stderr: Its standard error; None where a single group of tokens leaves nothing to estimate it from.
        n: What was counted: tokens of a perplexity, examples of an exact match.
        groups: Independent units behind the standard error: windows or examples.
    """

    value: float
    stderr: float | None
    n: int
    groups: int


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of a text, of which those from `scored` on are new."""

    start: int
    end: int
    scored: int


def text_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int,
    stride: int,
    max_windows: int | None = None,
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
) -> Score:
    """Score a running text.

    Args:
        model: A causal language model, on its device. Put into eval mode.
        tokenizer: Its tokenizer; special tokens are added once, at the text's begin, if it does so by itself.
        text: The text.
        window: Tokens a forward reads.
        stride: Tokens by which the window moves, at most `window`.
        max_windows: Score only so many windows from the begin; None for the whole text, its short last window included.
        batch_size: Windows a forward.
        autocast: dtype of matrix products; None for the model's own.

    Returns:
        The perplexity; `n` counts tokens, the standard error comes from the differences between windows.

    Raises:
        UsageError: The stride leaves gaps.
        DataError: The text has fewer than two tokens.
    """
    if not 1 <= stride <= window:
        raise UsageError(f"a stride of {stride} leaves gaps between windows of {window}", where="eval.perplexity.stride")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; at least 2 are needed", where="eval.perplexity")
    model.eval()
    windows = sliding_windows(len(ids), window=window, stride=stride)[:max_windows]
    nlls: list[float] = []
    counts: list[int] = []
    for start in range(0, len(windows), batch_size):
        chunk = windows[start : start + batch_size]
        # only the last window can be shorter than the others; alone in its forward it needs no padding
        for group in (chunk[:-1], chunk[-1:]) if chunk[-1].end - chunk[-1].start < window else (chunk,):
            if group:
                sums = row_losses(model, _batch(ids, group), autocast=autocast)
                nlls += sums[0]
                counts += sums[1]
    return perplexity_score(nlls, counts)


def sliding_windows(length: int, *, window: int, stride: int) -> list[Window]:
    """The windows over a text of `length` tokens; the first scores from its second token on."""
    found: list[Window] = []
    start = done = 0
    while done < length:
        end = min(start + window, length)
        # the token at `start` has no predecessor in the window
        found.append(Window(start=start, end=end, scored=max(done, start + 1)))
        start, done = start + stride, end
    return [one for one in found if one.scored < one.end]


@torch.no_grad()
def row_losses(model: nn.Module, batch: dict[str, Tensor], *, autocast: torch.dtype | None) -> tuple[list[float], list[int]]:
    """Sum of losses (nats) and number of scored tokens of each row of a batch, summed in float64."""
    device = next(model.parameters()).device
    on_device = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        found = token_losses(model, on_device)
    rows = len(batch["input_ids"])
    sums = torch.zeros(rows, dtype=torch.float64, device=device).index_add_(0, found.rows, found.losses.double())
    return sums.tolist(), torch.bincount(found.rows, minlength=rows).tolist()


def perplexity_score(nlls: Sequence[float], counts: Sequence[int]) -> Score:
    """The exponential of the mean loss a token, with the standard error of a ratio over independent groups (delta method).

    Args:
        nlls: Summed losses of each group, nats.
        counts: Scored tokens of each group.

    Raises:
        NumericsError: A loss is not finite.
    """
    tokens, groups = sum(counts), len(nlls)
    mean = math.fsum(nlls) / tokens
    if not math.isfinite(mean):
        raise NumericsError("the model's loss is not finite", where="eval", remedy="evaluate with model.dtype=float32")
    value = math.exp(mean) if mean < 700 else math.inf
    if groups < 2:
        return Score(value=value, stderr=None, n=tokens, groups=groups)
    # tokens of one window or answer are not independent of each other, so they count as one unit
    spread = math.fsum((nll - mean * count) ** 2 for nll, count in zip(nlls, counts, strict=True))
    return Score(value=value, stderr=value * math.sqrt(spread * groups / (groups - 1)) / tokens, n=tokens, groups=groups)


def _batch(ids: Tensor, windows: Sequence[Window]) -> dict[str, Tensor]:
    """Stack windows of equal length; labels only on the tokens each of them scores."""
    inputs = torch.stack([ids[one.start : one.end] for one in windows])
    labels = inputs.clone()
    for row, one in enumerate(windows):
        labels[row, : one.scored - one.start] = IGNORED
    return {"input_ids": inputs, "labels": labels}
