"""Conversations: jsonl with `{"messages": [{"role", "content"}, ...]}`, every turn of the assistant trained.

The tokenizer's chat template writes the text; what it adds around a turn of the assistant (header, end mark) is found by
rendering the conversation up to and including the turn. Without a template a plain one is used, a line a turn ("User: ...").
Tools, images and content in parts are not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qwha_cli.data import files
from qwha_cli.data.example import Example, Segment
from qwha_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
Message = dict[str, str]
# (messages, whether to add the header of a turn that the assistant is about to write) -> text
Render = Callable[[Sequence[Message], bool], str]


def read(
    path: str | None, *, split: str, seed: int = 0, limit: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Example]:
    """Conversations of a local file, in its order.

    Args:
        path: A `.jsonl` (or `.json` list), or a folder with `<split>.jsonl`.
        split: Which file of a folder.
        seed: Unused; nothing here is random.
        limit: Only the first so many.
        tokenizer: Whose chat template to use; None, or one without a template, for the plain form.

    Raises:
        DataError: No path, no such file, or a malformed conversation (named).
    """
    if path is None:
        raise DataError("format chat needs a path", where="chat", remedy="set path to a .jsonl file with messages")
    render = _template(tokenizer) if tokenizer is not None and tokenizer.chat_template else _plain
    end = str(tokenizer.eos_token) if tokenizer is not None and tokenizer.eos_token else ""

    def convert(record: files.Record, where: str) -> Example:
        messages = _messages(record, where)
        try:
            return _example(messages, render, end=end, where=where)
        except DataError:
            raise
        except Exception as error:
            # a template is a program of its own: it raises jinja's errors, ValueError, TypeError, KeyError ...
            raise DataError(
                f"the chat template refused this conversation: {error}", where=where, remedy="correct the order of its roles"
            ) from error

    return files.read_examples(files.read_records(files.find_file(path, split=split)), convert, limit=limit)


def _messages(record: files.Record, where: str) -> list[Message]:
    found = record.get("messages")
    if not isinstance(found, list) or not found:
        keys = ", ".join(sorted(record)) or "none"
        raise DataError(f"'messages' must be a non-empty list (keys here: {keys})", where=where, remedy="write {messages: []}")
    messages: list[Message] = []
    for number, message in enumerate(found):
        place = f"{where} message {number}"
        if not isinstance(message, dict):
            raise DataError(f"expected an object, found {type(message).__name__}", where=place, remedy="write {role, content}")
        role = files.text_field(message, "role", where=place)
        if role not in ROLES:
            raise DataError(f"role {role!r} is none of {', '.join(ROLES)}", where=place, remedy="rename the role")
        messages.append({"role": role, "content": files.text_field(message, "content", where=place)})
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no turn of the assistant to train on", where=where, remedy="drop this conversation")
    return messages


def _example(messages: Sequence[Message], render: Render, *, end: str, where: str) -> Example:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    # templates that rewrite earlier turns (they drop old reasoning) only allow the last turn to be trained
    segments = _segments(messages, turns, render) or _segments(messages, turns[-1:], render)
    if segments is None:
        raise DataError("the chat template rewrites earlier text", where=where, remedy="use format: jsonl instead")
    last = segments[-1]
    if end and last.text.rstrip().endswith(end):
        # so that the end mark is the last token, and tokenizing does not append a second one
        segments[-1] = Segment(last.text.rstrip(), True)
    return Example(tuple(segments))


def _segments(messages: Sequence[Message], turns: Sequence[int], render: Render) -> list[Segment] | None:
    segments: list[Segment] = []
    done = ""
    for turn in turns:
        before, after = render(messages[:turn], True), render(messages[: turn + 1], False)
        if not before.startswith(done) or not after.startswith(before):
            return None
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    return segments


def _template(tokenizer: PreTrainedTokenizerBase) -> Render:
    def render(messages: Sequence[Message], header: bool) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=header))

    return render


def _plain(messages: Sequence[Message], header: bool) -> str:
    lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
    return "".join(lines) + ("Assistant: " if header else "")
