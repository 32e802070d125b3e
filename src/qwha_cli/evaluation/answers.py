"""Held-out questions: how likely the right answers are, and how often greedy generation ends in the right number.

Prompts are tokenized exactly as in training (`data.tokenize`), so nothing is measured on token boundaries the model never saw.
Both measures sort by length for even batches, restore the order, and depend on the batch size only by floating-point rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qwha_cli.data.collate import pad_batch
from qwha_cli.data.example import Example
from qwha_cli.data.tokenize import Encoded, encode, encode_prompt
from qwha_cli.errors import DataError
from qwha_cli.evaluation.perplexity import Score, perplexity_score, row_losses

_MARK = re.compile("the final answer is", re.IGNORECASE)
# A sign counts only where no word or closing bracket precedes it ("10-5" holds 10 and 5), a comma only as a thousands separator.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\].])[-−])?[$€£]?(?P<inner>(?<=[$€£])[-−])?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)


def answer_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> Score:
    """Perplexity of the trained segments (answers and their end token), each given what precedes it.

    Args:
        model: A causal language model, on its device. Put into eval mode.
        tokenizer: Its tokenizer.
        examples: Held-out examples. Those with no answer token within `max_length` are left out.
        max_length: Tokens at which an example is cut.
        batch_size: Examples a forward.
        autocast: dtype of matrix products; None for the model's own.

    Returns:
        The perplexity; `n` counts tokens, `groups` examples.

    Raises:
        DataError: No example has an answer within `max_length`.
    """
    encoded = [encode(example, tokenizer, max_length=max_length) for example in examples]
    scored = sorted((one for one in encoded if one.num_trained), key=lambda one: len(one.input_ids))
    if not scored:
        raise DataError(
            f"none of {len(encoded)} examples has an answer within {max_length} tokens",
            where="eval.answers",
            remedy="raise train.max_length or check the data",
        )
    model.eval()
    nlls: list[float] = []
    counts: list[int] = []
    for start in range(0, len(scored), batch_size):
        batch = pad_batch(scored[start : start + batch_size], pad_id=_pad_id(tokenizer))
        sums = row_losses(model, batch, autocast=autocast)
        nlls += sums[0]
        counts += sums[1]
    return perplexity_score(nlls, counts)


class AnswerSample(TypedDict):
    """One generated answer, JSON-able: what was asked, what the model wrote, and whether the number in it is the expected one."""

    prompt: str
    response: str
    expected: str
    found: str | None
    correct: bool


def exact_match(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> tuple[Score, list[AnswerSample]]:
    """Answer by greedy generation and count the right final numbers.

    Args:
        model: A causal language model with `generate`, on its device. Put into eval mode.
        tokenizer: Its tokenizer.
        examples: Examples with an `answer`.
        max_new_tokens: Where an answer that does not end by itself is cut.
        batch_size: Examples generated together, padded on the left.
        autocast: dtype of matrix products; None for the model's own.

    Returns:
        The share of right answers with its binomial standard error, and every answer in the order of `examples`.

    Raises:
        DataError: There are no examples, or one has no number to compare with.
    """
    expected = [extract_number(example.answer or "") for example in examples]
    if not examples or None in expected:
        what = (
            f"example {expected.index(None)} has {examples[expected.index(None)].answer!r}"
            if examples
            else "there are no examples"
        )
        raise DataError(
            f"exact match compares final numbers, and {what}",
            where="eval.answers",
            remedy="set eval.answers.exact_match to null, or score a data set with final numbers (gsm8k, synthetic)",
        )
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    responses = generate_greedy(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, autocast=autocast
    )
    samples: list[AnswerSample] = []
    for example, number, response in zip(examples, expected, responses, strict=True):
        found = extract_number(response)
        samples.append(
            AnswerSample(
                prompt=example.prompt,
                response=response,
                expected=str(number),
                found=None if found is None else str(found),
                correct=found == number,
            )
        )
    n = len(samples)
    share = sum(sample["correct"] for sample in samples) / n
    return Score(value=share, stderr=math.sqrt(share * (1 - share) / n), n=n, groups=n), samples


@torch.no_grad()
def generate_greedy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> list[str]:
    """Continue token prompts greedily until an end token; return the new texts in the order of the prompts."""
    model.eval()
    device = next(model.parameters()).device
    pad_id = _pad_id(tokenizer)
    config = _greedy_config(model, tokenizer, max_new_tokens=max_new_tokens, pad_id=pad_id)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # left: the next token must follow the prompt's last token, not padding
        batch = pad_batch([Encoded(prompts[i], [-100] * len(prompts[i])) for i in chosen], pad_id=pad_id, side="left")
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            output = cast(Tensor, model.generate(**inputs, generation_config=config))  # pyright: ignore
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        for index, ids in zip(chosen, new, strict=True):
            texts[index] = str(tokenizer.decode(_until_end(ids, config), skip_special_tokens=True))
    return texts


def extract_number(text: str) -> Decimal | None:
    """The final number of an answer: the first one after "The final answer is", else the last one of the text.

    Thousands separators, currency signs and a closing full stop are read over; "18.0" and "18" are the same number.
    """
    mark = _MARK.search(text)
    if mark:
        after = _NUMBER.search(text, mark.end())
        if after:
            return _decimal(after)
    found = list(_NUMBER.finditer(text))
    return _decimal(found[-1]) if found else None


def _decimal(match: re.Match[str]) -> Decimal:
    number = Decimal(match["digits"].replace(",", ""))
    number = -number if match["sign"] or match["inner"] else number
    # normalised for display, but without an exponent: 1800 must not become 1.8E+3
    return number.quantize(Decimal(1)) if number == number.to_integral_value() and number.adjusted() < 27 else number.normalize()


def _greedy_config(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, pad_id: int) -> GenerationConfig:
    """Plain greedy decoding, whatever the model's own generation_config says: instruct models ship sampling and penalties."""
    ends: set[int] = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends |= {own} if isinstance(own, int) else set(own or ())
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=sorted(ends) or None,
    )


def _until_end(ids: list[int], config: GenerationConfig) -> list[int]:
    ends = cast("list[int]", config.eos_token_id or [])
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token; any token does, since it is masked everywhere, so 0 when the tokenizer names none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
