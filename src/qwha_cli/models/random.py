"""Models with random weights: for tests, and for measuring speed and memory at real sizes without a download.

`random:tiny-llama` is two small blocks whose sizes are no powers of two; the other names have the published shapes; anything else
is the path of a config.json (or of a folder with one). The tokenizer has a token a byte, so any text can be tokenized offline.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from qwha_cli import catalog
from qwha_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

CONFIGS: dict[str, dict[str, object]] = {
    "tiny-llama": {
        "model_type": "llama",
        "vocab_size": VOCABULARY + 1,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        # larger than usual: with 0.02 and so few weights all logits are nearly equal, and tests would compare noise
        "initializer_range": 0.1,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_window": None,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
}


def random_config(name: str) -> PretrainedConfig:
    """The configuration of `random:NAME`, its special tokens set to those of `byte_tokenizer`.

    Raises:
        ModelError: Neither a known name nor a config file, or a configuration that transformers does not know.
    """
    from transformers import AutoConfig

    settings = dict(CONFIGS[name]) if name in CONFIGS else _read(name)
    family = settings.pop("model_type", None)
    settings.update(pad_token_id=256, bos_token_id=257, eos_token_id=258)
    try:
        config = AutoConfig.for_model(str(family), **settings)
    except Exception as error:
        # besides ValueError and TypeError transformers raises its validators' own kinds here
        message = " ".join(str(error).split())[:300]
        raise ModelError(
            f"transformers refuses this configuration: {message}", where=name, remedy="correct the config.json"
        ) from error
    size = getattr(config.get_text_config(), "vocab_size", 0)
    if size < VOCABULARY:
        raise ModelError(
            f"vocab_size {size} is too small for a token a byte", where=name, remedy=f"set it to {VOCABULARY} or more"
        )
    return config


def random_model(name: str, *, dtype: torch.dtype | None, seed: int) -> PreTrainedModel:
    """A model with weights drawn from its configuration's initializer, the same for the same seed and dtype.

    Args:
        name: A name of CONFIGS, or the path of a config.json.
        dtype: Of the weights; None for the configuration's own, else float32.
        seed: Of the weights. The caller's random stream is left alone.

    Raises:
        ModelError: As `random_config`, or no decoder-only architecture.
    """
    from transformers import AutoModelForCausalLM

    config = random_config(name)
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or own)
        except ValueError as error:
            remedy = "use the configuration of a decoder-only model"
            raise ModelError(str(error).splitlines()[0], where=name, remedy=remedy) from error
    return cast("PreTrainedModel", model)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, and pad, begin and end tokens; built in memory. It puts no begin token in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *SPECIAL_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, begin, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end, clean_up_tokenization_spaces=False
    )


def _read(name: str) -> dict[str, object]:
    place = Path(name).expanduser()
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        near = catalog.nearest(name, CONFIGS)
        hint = f"did you mean {near!r}? " if near else ""
        raise ModelError(
            f"neither a known configuration nor a config.json; {hint}known: {', '.join(CONFIGS)}",
            where=f"random:{name}",
            remedy="correct model.id",
        )
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"not JSON: {error}", where=str(file), remedy="repair the file") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise ModelError("not a model's configuration: no model_type", where=str(file), remedy="name the config.json of a model")
    return cast("dict[str, object]", found)
