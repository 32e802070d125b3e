"""Examples to token ids and labels.

Each segment is tokenized on its own, because that is what generation does: the prompt is a finished token sequence before the
first token of the response exists. Labels are the ids themselves where loss is wanted and -100 elsewhere; shifting by one is
left to the model, as transformers does it. No padding here (`collate.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwha_cli.data.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that carries no loss, as in torch.nn.functional.cross_entropy."""


@dataclass(frozen=True)
class Encoded:
    """One tokenized example: ids and labels of equal length."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_trained(self) -> int:
        """How many tokens carry loss, after the shift by one: the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None, mask_prompt: bool = True
) -> Encoded:
    """Tokenize an example, with the tokenizer's own begin token in front and a trained end-of-sequence token behind.

    Args:
        example: What to tokenize.
        tokenizer: Any Hugging Face tokenizer. Without an end token none is appended.
        max_length: Longest result in tokens; None for no limit. What is longer loses its tail, and then gets no end token: a
            model must not learn to stop in mid-sentence. A prompt that fills everything leaves `num_trained` = 0.
        mask_prompt: Whether segments that are only read carry no loss. False trains on every token.

    Returns:
        Token ids and labels.
    """
    ids = begin_ids(tokenizer, example.segments[0].text)
    labels = [IGNORED] * len(ids)
    for segment in example.segments:
        piece = text_ids(tokenizer, segment.text)
        ids += piece
        labels += piece if segment.trained or not mask_prompt else [IGNORED] * len(piece)
    end = tokenizer.eos_token_id
    # a chat template may have written the end token already
    if isinstance(end, int) and (not ids or ids[-1] != end):
        ids.append(end)
        labels.append(end)
    return Encoded(ids[:max_length], labels[:max_length])


def encode_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids in front of the last trained segment, exactly as `encode` writes them: where generation starts."""
    last = max(index for index, segment in enumerate(example.segments) if segment.trained)
    ids = begin_ids(tokenizer, example.segments[0].text)
    for segment in example.segments[:last]:
        ids += text_ids(tokenizer, segment.text)
    return ids


def begin_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens that this tokenizer puts before any text (usually none or one), unless `text` begins with them already."""
    begin = tokenizer.bos_token
    if isinstance(begin, str) and text.startswith(begin):
        return []
    plain = text_ids(tokenizer, "a")
    full: list[int] = tokenizer("a", verbose=False)["input_ids"]
    # asked of the tokenizer and not of a flag: Llama, Gemma and Qwen each say it in another way
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text and nothing else: no begin or end token, no length warning."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
