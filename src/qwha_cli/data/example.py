"""What every data set is read into: an example is a few pieces of text, each either trained on or only read.

A question and its answer are two segments; a conversation has one trained segment for every turn of the assistant. Tokens,
masks and batches come later (`tokenize.py`, `collate.py`); nothing here knows a tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A piece of text and whether its tokens carry loss."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Example:
    """One training or test example.

    Attributes:
        segments: The text in order. At least one is trained.
        answer: The final answer that exact match compares with ("18"), when the data set has one.
    """

    segments: tuple[Segment, ...]
    answer: str | None = None

    @property
    def prompt(self) -> str:
        """All text before the last trained segment: what a model is given when it is scored."""
        return "".join(segment.text for segment in self.segments[: self._last_trained()])

    @property
    def response(self) -> str:
        """The last trained segment's text: what a good model would write."""
        return self.segments[self._last_trained()].text

    def _last_trained(self) -> int:
        return max(index for index, segment in enumerate(self.segments) if segment.trained)


def prompt_and_response(prompt: str, response: str, *, answer: str | None = None) -> Example:
    """The usual example: a prompt that is only read and a response that is trained."""
    return Example((Segment(prompt, False), Segment(response, True)), answer)
