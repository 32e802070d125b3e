"""Held-out answers: their likelihood, greedy generation in batches, and the number a text ends in."""

from __future__ import annotations

import json
import math
from decimal import Decimal

import pytest
import torch

from qwha_cli.data.example import Example, prompt_and_response
from qwha_cli.data.tokenize import encode, encode_prompt
from qwha_cli.errors import DataError
from qwha_cli.evaluation.answers import answer_perplexity, exact_match, extract_number, generate_greedy
from support.tiny_model import tiny_llama, tiny_tokenizer

MODEL, TOKENIZER = tiny_llama(), tiny_tokenizer()
EXAMPLES = [
    prompt_and_response("What is 6 times 3?\n", "6 * 3 = 18. The final answer is: 18", answer="18"),
    prompt_and_response("1+1?\n", "The final answer is: 2", answer="2"),
    prompt_and_response("Ann has 3 apples and buys 4 more, then eats one. How many?\n", "The final answer is: 6", answer="6"),
    prompt_and_response("Count to 1,000.\n", "The final answer is: 1,000", answer="1,000"),
]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The final answer is: 18", "18"),
        ("The final answer is: 18.", "18"),
        ("The final answer is 18, because 9 + 9 = 18 and not 20", "18"),
        ("the final answer is: $1,234.50.", "1234.5"),
        ("so 3 + 4 = 7", "7"),
        ("#### 42", "42"),
        ("it costs $5 and then $-3", "-3"),
        ("minus: -12", "-12"),
        ("minus: −12", "-12"),
        ("-$8", "-8"),
        ("10-5", "5"),
        ("(7)-5", "5"),
        ("0.25", "0.25"),
        (".5 of it", "0.5"),
        ("12.0", "12"),
        ("1,000,000", "1000000"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("1800", "1800"),
        ("The final answer is: unknown, maybe 4 in the text before", "4"),
        ("7 apples. The final answer is: none", "7"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_text(text: str, number: str | None) -> None:
    found = extract_number(text)
    assert found == (None if number is None else Decimal(number))
    assert number is None or str(found) == number


def test_answer_perplexity_is_that_of_the_answer_tokens_alone() -> None:
    losses: list[float] = []
    for example in EXAMPLES:
        encoded = encode(example, TOKENIZER)
        with torch.no_grad():
            log_p = MODEL(torch.tensor([encoded.input_ids])).logits[0].double().log_softmax(-1)
        losses += [-float(log_p[i - 1, label]) for i, label in enumerate(encoded.labels) if label != -100]
    for batch_size in (1, 3, 8):
        score = answer_perplexity(MODEL, TOKENIZER, EXAMPLES, max_length=512, batch_size=batch_size)
        assert score.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
        assert (score.n, score.groups) == (len(losses), 4)


def test_no_answer_within_the_length_is_an_error() -> None:
    with pytest.raises(DataError, match="none of 4 examples has an answer within 4 tokens"):
        answer_perplexity(MODEL, TOKENIZER, EXAMPLES, max_length=4, batch_size=2)


def test_a_batch_of_different_lengths_generates_what_one_at_a_time_does() -> None:
    prompts = [encode_prompt(example, TOKENIZER) for example in EXAMPLES]
    together = generate_greedy(MODEL, TOKENIZER, prompts, max_new_tokens=24, batch_size=4)
    alone = generate_greedy(MODEL, TOKENIZER, prompts, max_new_tokens=24, batch_size=1)
    assert together == alone
    assert len(set(together)) > 1


def test_generation_is_the_argmax_of_the_models_logits_until_the_end_token() -> None:
    ids = encode_prompt(EXAMPLES[0], TOKENIZER)
    expected: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            expected.append(int(MODEL(torch.tensor([ids + expected])).logits[0, -1].argmax()))
    # the fifth token becomes the end token: the text must stop in front of its first occurrence
    end = expected[4]
    tokenizer = tiny_tokenizer()
    model = tiny_llama()
    model.generation_config.eos_token_id = [end]
    model.generation_config.do_sample = True
    model.generation_config.temperature = 3.0
    model.generation_config.repetition_penalty = 2.0
    text = generate_greedy(model, tokenizer, [ids], max_new_tokens=12, batch_size=1)[0]
    assert text == tokenizer.decode(expected[: expected.index(end)], skip_special_tokens=True)


def test_exact_match_counts_right_numbers_in_the_order_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    written = ["so it is 18", "The final answer is: 3.", "The final answer is: 6, surely not 7", "1000.00"]
    monkeypatch.setattr("qwha_cli.evaluation.answers.generate_greedy", lambda *_, **__: written)
    score, samples = exact_match(MODEL, TOKENIZER, EXAMPLES, max_new_tokens=8, batch_size=2)
    assert [sample["correct"] for sample in samples] == [True, False, True, True]
    assert (score.value, score.n) == (0.75, 4)
    assert score.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert samples[1] == {
        "prompt": "1+1?\n",
        "response": "The final answer is: 3.",
        "expected": "2",
        "found": "3",
        "correct": False,
    }
    json.dumps(samples)


def test_exact_match_really_generates() -> None:
    score, samples = exact_match(MODEL, TOKENIZER, EXAMPLES, max_new_tokens=5, batch_size=2)
    assert score.n == 4
    assert all(sample["response"] for sample in samples)


def test_examples_without_a_final_number_are_refused() -> None:
    with pytest.raises(DataError, match="example 1 has 'blue'"):
        exact_match(MODEL, TOKENIZER, [EXAMPLES[0], Example(EXAMPLES[1].segments, "blue")], max_new_tokens=4, batch_size=1)
    with pytest.raises(DataError, match="there are no examples"):
        exact_match(MODEL, TOKENIZER, [], max_new_tokens=4, batch_size=1)
