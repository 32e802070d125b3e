"""Tiny random models and a byte-level tokenizer for tests, built offline in milliseconds.

Sizes are deliberately not powers of two: hidden 48 = 12 * 4 and feed-forward 80 = 20 * 4 need Hadamard bases of order 12 and 20,
so a test that passes here does not pass only because everything is 2^k.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 260
"""256 bytes and the four special tokens."""

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

SHAPE: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}


def tiny_llama(seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random 3-layer Llama in float32, in eval mode. `overrides` go to its LlamaConfig."""
    return _build(LlamaForCausalLM, LlamaConfig(**{**SHAPE, **overrides}), seed)


def tiny_qwen2(seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random 3-layer Qwen2 (biases on q, k, v; tied embeddings unless overridden) in float32, in eval mode."""
    return _build(Qwen2ForCausalLM, Qwen2Config(**{**SHAPE, "tie_word_embeddings": True, **overrides}), seed)


def _build(model_class: type[PreTrainedModel], config: LlamaConfig | Qwen2Config, seed: int) -> PreTrainedModel:
    # fork_rng: building a model must not disturb the random stream of the test that asks for it
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            # transformers initialises biases to zero, which would hide a dropped bias; and std 0.02 gives nearly constant logits
            if name.endswith("bias") or parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(torch.float32).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token a byte) with pad, bos, eos, unk and no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *SPECIAL_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
