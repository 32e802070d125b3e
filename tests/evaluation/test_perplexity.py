"""Sliding-window perplexity against a token-by-token float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

from qwha_cli.errors import DataError, NumericsError, UsageError
from qwha_cli.evaluation.perplexity import perplexity_score, sliding_windows, text_perplexity
from support.tiny_model import tiny_llama, tiny_tokenizer

TEXT = "The transform of a vector of length n takes n log n additions. " * 3
MODEL, TOKENIZER = tiny_llama(), tiny_tokenizer()


@torch.no_grad()
def reference(text: str, *, window: int, stride: int) -> tuple[float, int]:
    """Each token once, alone, with the context its window gives it; in float64."""
    ids = torch.tensor(TOKENIZER(text)["input_ids"])
    model = tiny_llama().double()
    losses: list[float] = []
    start = scored = 0
    while scored < len(ids):
        end = min(start + window, len(ids))
        for place in range(max(scored, start + 1), end):
            log_p = model(ids[None, start:place]).logits[0, -1].log_softmax(-1)
            losses.append(-float(log_p[ids[place]]))
        start, scored = start + stride, end
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 16), (32, 5), (40, 39), (500, 100), (9, 1)])
def test_perplexity_is_that_of_scoring_one_token_after_another(window: int, stride: int) -> None:
    score = text_perplexity(MODEL, TOKENIZER, TEXT[:70], window=window, stride=stride, batch_size=3)
    value, count = reference(TEXT[:70], window=window, stride=stride)
    assert score.n == count
    assert score.value == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("length", "window", "stride"), [(100, 32, 16), (100, 32, 7), (33, 32, 31), (5, 32, 16), (2, 2, 1)])
def test_every_token_but_the_first_is_scored_exactly_once(length: int, window: int, stride: int) -> None:
    windows = sliding_windows(length, window=window, stride=stride)
    assert [place for one in windows for place in range(one.scored, one.end)] == list(range(1, length))
    assert all(one.end - one.start <= window for one in windows)


def test_stride_equal_to_the_window_is_the_customary_separate_windows() -> None:
    ids = torch.tensor(TOKENIZER(TEXT)["input_ids"])[:128].reshape(4, 32)
    with torch.no_grad():
        loss = float(MODEL(input_ids=ids, labels=ids).loss)
    score = text_perplexity(MODEL, TOKENIZER, TEXT, window=32, stride=32, max_windows=4, batch_size=2)
    assert score.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert (score.n, score.groups) == (4 * 31, 4)


def test_batch_size_does_not_change_the_score() -> None:
    scores = [text_perplexity(MODEL, TOKENIZER, TEXT, window=32, stride=16, batch_size=size) for size in (1, 4, 64)]
    assert all(score.value == pytest.approx(scores[0].value, rel=1e-6) for score in scores)
    assert all(score.n == scores[0].n for score in scores)


def test_standard_error_is_the_spread_between_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = 3.0 + torch.randn(400, 50, generator=generator, dtype=torch.float64)
    values = [perplexity_score([float(row.sum()) for row in part], [50] * 20) for part in samples.split(20)]
    observed = torch.tensor([score.value for score in values]).std()
    claimed = torch.tensor([score.stderr or 0.0 for score in values]).mean()
    assert 0.6 < float(claimed / observed) < 1.6
    assert perplexity_score([30.0], [10]).stderr is None


def test_autocast_stays_near_the_full_precision_score() -> None:
    plain = text_perplexity(MODEL, TOKENIZER, TEXT, window=64, stride=64)
    cast = text_perplexity(MODEL, TOKENIZER, TEXT, window=64, stride=64, autocast=torch.bfloat16)
    assert cast.value == pytest.approx(plain.value, rel=0.03)
    assert cast.value != plain.value


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UsageError, match="stride of 33 leaves gaps"):
        text_perplexity(MODEL, TOKENIZER, TEXT, window=32, stride=33)
    with pytest.raises(DataError, match="the text has 1 tokens"):
        text_perplexity(MODEL, TOKENIZER, "a", window=32, stride=32)
    with pytest.raises(NumericsError, match="not finite"):
        perplexity_score([math.nan], [3])
