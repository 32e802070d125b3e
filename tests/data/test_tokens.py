from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel, PreTrainedTokenizerFast

from qwha_cli.data.collate import pack, packed_batch, pad_batch
from qwha_cli.data.example import Example, Segment, prompt_and_response
from qwha_cli.data.tokenize import IGNORED, Encoded, encode, encode_prompt
from qwha_cli.errors import DataError
from support.tiny_model import tiny_llama, tiny_qwen2, tiny_tokenizer

EOS, BOS = 258, 257


def _with_begin_and_end() -> PreTrainedTokenizerFast:
    """A tokenizer that frames every text, as Llama's (begin) and some encoders' (end) do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer


def test_only_the_response_and_the_end_token_carry_loss() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode(prompt_and_response("ab", "cd"), tokenizer)
    ids = tokenizer("abcd").input_ids
    assert encoded.input_ids == [*ids, EOS]
    assert encoded.labels == [IGNORED, IGNORED, *ids[2:], EOS]
    assert encoded.num_trained == 3
    assert encode(prompt_and_response("ab", "cd"), tokenizer, mask_prompt=False).labels == [*ids, EOS]


def test_the_begin_token_stands_once_in_front_and_carries_no_loss() -> None:
    tokenizer = _with_begin_and_end()
    conversation = Example((Segment("a", False), Segment("b", True), Segment("c", False), Segment("d", True)))
    encoded = encode(conversation, tokenizer)
    a, b, c, d = tiny_tokenizer()("abcd").input_ids
    assert encoded.input_ids == [BOS, a, b, c, d, EOS]
    assert encoded.labels == [IGNORED, IGNORED, b, IGNORED, d, EOS]
    assert encode_prompt(conversation, tokenizer) == [BOS, a, b, c]
    # a chat template writes it itself
    assert encode(prompt_and_response("<bos>a", "b<eos>"), tokenizer).input_ids == [BOS, a, b, EOS]


def test_what_is_too_long_loses_its_tail_and_gets_no_end_token() -> None:
    example = prompt_and_response("abc", "def")
    assert encode(example, tiny_tokenizer(), max_length=7).input_ids[-1] == EOS
    cut = encode(example, tiny_tokenizer(), max_length=5)
    assert len(cut.input_ids) == len(cut.labels) == 5
    assert cut.num_trained == 2
    assert cut.input_ids[-1] != EOS
    assert encode(example, tiny_tokenizer(), max_length=3).num_trained == 0


def test_an_example_gives_its_last_trained_segment_as_response() -> None:
    example = Example((Segment("q1", False), Segment("a1", True), Segment("q2", False), Segment("a2", True)))
    assert (example.prompt, example.response) == ("q1a1q2", "a2")


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_fills_the_asked_side_without_attention_or_loss(side: str) -> None:
    batch = pad_batch([Encoded([1, 2, 3], [IGNORED, 2, 3]), Encoded([4], [4])], pad_id=9, side=side)
    short = {"right": ([4, 9, 9], [1, 0, 0], [4, IGNORED, IGNORED]), "left": ([9, 9, 4], [0, 0, 1], [IGNORED, IGNORED, 4])}[side]
    assert batch["input_ids"].tolist() == [[1, 2, 3], short[0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], short[1]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], short[2]]


def _encoded(seed: int, count: int = 40, longest: int = 30) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    examples: list[Encoded] = []
    for length in torch.randint(1, longest + 1, (count,), generator=generator).tolist():
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        examples.append(Encoded(ids, [IGNORED] * (length // 2) + ids[length // 2 :]))
    return examples


def test_packing_keeps_every_example_whole_and_fills_rows_well() -> None:
    encoded = _encoded(0, count=200)
    rows = pack(encoded, length=64)
    found = []
    for row in rows:
        assert sum(row.lengths) == len(row.input_ids) == len(row.labels) <= 64
        start = 0
        for length in row.lengths:
            found.append(row.input_ids[start : start + length])
            start += length
    assert sorted(found) == sorted(one.input_ids for one in encoded)
    total = sum(len(one.input_ids) for one in encoded)
    assert len(rows) <= -(-total // 64) * 1.1
    assert pack(encoded, length=64) == rows
    assert sum(row.num_trained for row in rows) == sum(one.num_trained for one in encoded)


def test_an_example_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(DataError, match="example 1 has 5 tokens and a packed row holds 4"):
        pack([Encoded([1], [1]), Encoded([1] * 5, [1] * 5)], length=4)


def _gemma3() -> PreTrainedModel:
    config = Gemma3TextConfig(
        vocab_size=260,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=6,
        sliding_window_pattern=2,
        query_pre_attn_scalar=12,
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


def _token_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)
    return losses[labels[:, 1:] != IGNORED]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, _gemma3], ids=["llama", "qwen2", "gemma3 with windows"])
def test_packed_examples_do_not_see_each_other(build: object, attention: str) -> None:
    model = build()  # type: ignore[operator]
    model.set_attn_implementation(attention)
    encoded = _encoded(1, count=12)
    padded = _token_losses(model, pad_batch(encoded, pad_id=256))
    packed = _token_losses(model, packed_batch(pack(encoded, length=64), pad_id=256))
    assert len(packed) == len(padded) == sum(one.num_trained for one in encoded)
    torch.testing.assert_close(packed.sort().values, padded.sort().values, rtol=1e-5, atol=1e-5)


def test_a_packed_batch_has_nothing_that_would_switch_the_isolation_off() -> None:
    batch = packed_batch(pack([Encoded([1, 2], [1, 2]), Encoded([3, 4, 5], [3, 4, 5]), Encoded([6], [6])], length=5), pad_id=0)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, 4, 5], [IGNORED] * 5]
