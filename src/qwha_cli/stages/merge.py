"""The merge stage: one ordinary Hugging Face folder that plain transformers loads, checked against base plus adapter.

The merge goes onto the dequantized base, W' = Q̂ + F Hᵀ or (Q̂ + F) Hᵀ, never onto the original weights: F already holds part of
W − Q̂, and adding it to W would count that twice. What rounding to the merged number format costs is measured on fixed prompts
and refused above the recipe's tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from qwha_cli.adapters.build import load_adapter
from qwha_cli.errors import GateError
from qwha_cli.models.load import load_tokenizer
from qwha_cli.quant.checkpoint import load_base
from qwha_cli.stages.context import StageContext
from qwha_cli.stages.plan import FOLDERS

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Fixed text of several kinds, so that the comparison is the same in every run.
PROMPTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "The river rises in the northern hills and flows south through farmland before it reaches the sea.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Question: Which planet is closest to the Sun?\nAnswer:",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "In 1905 a clerk in a patent office wrote four papers that changed",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam, I am writing to enquire about the",
)


def run(context: StageContext) -> dict[str, object]:
    """Merge the trained adapter, write the model, reload it and compare; return the comparison."""
    recipe = context.recipe
    quantized = context.inputs["train"].parent / FOLDERS["quantize"]
    tokenizer = load_tokenizer(quantized)
    context.progress(0, 3, "loading base and adapter")
    adapted = load_adapter(load_base(quantized, dtype=torch.float32), context.inputs["train"], trainable=False)
    adapted.to(context.device)
    expected = logits(adapted, tokenizer, prompts=recipe.merge.prompts)
    context.progress(1, 3, "merging")
    adapted.cpu()
    plain = merge_model(adapted, dtype=_DTYPES[recipe.merge.into])
    plain.save_pretrained(context.draft)
    tokenizer.save_pretrained(context.draft)
    del adapted, plain
    context.progress(2, 3, "checking the written model")
    check = compare_merged(context.draft, expected, tokenizer, device=context.device)
    check["prompts"] = len(expected)
    (context.draft / "check.json").write_text(json.dumps(check, indent=2) + "\n", encoding="utf-8")
    tolerance = recipe.merge.tolerance
    over = [name for name in ("max_logit_difference", "kl") if check[name] > getattr(tolerance, name)]
    if over:
        found = ", ".join(f"{name} {check[name]:.3g} > {getattr(tolerance, name):.3g}" for name in over)
        raise GateError(
            f"the merged model differs from base + adapter: {found}",
            where="merge",
            remedy="merge into fp32 with merge.into=fp32, or raise merge.tolerance if that much is acceptable",
        )
    size = sum(p.stat().st_size for p in context.draft.glob("*.safetensors")) / 1e6
    return {**check, "into": recipe.merge.into, "megabytes": size}


def merge_model(adapted: PeftModel, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model with every quantized or adapted layer replaced by a plain linear in `dtype`.

    Args:
        adapted: A peft model over a quantized base, on the CPU. It is taken apart.
        dtype: Number format of all floating-point weights of the result.
    """
    model = cast(PreTrainedModel, adapted.merge_and_unload())
    cast(nn.Module, model).to(dtype)
    model.config.dtype = dtype
    return model


def logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, prompts: int = len(PROMPTS)) -> list[Tensor]:
    """Return the logits of the first so many fixed prompts, each float32 (tokens, vocabulary), on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    found: list[Tensor] = []
    with torch.no_grad():
        for prompt in PROMPTS[:prompts]:
            ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
            found.append(model(input_ids=ids).logits[0].float().cpu())
    return found


def compare_merged(
    folder: Path, expected: list[Tensor], tokenizer: PreTrainedTokenizerBase, *, device: torch.device
) -> dict[str, float]:
    """Load a merged folder with plain transformers and compare its logits.

    Returns:
        `max_logit_difference`: the largest |Δlogit| over prompts, tokens and words.
        `kl`: mean over tokens of KL(base + adapter || merged), in nats.
    """
    model = cast(nn.Module, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).to(device)
    found = logits(model, tokenizer, prompts=len(expected))
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    divergences = [
        torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        for a, b in zip(expected, found, strict=True)
    ]
    return {"max_logit_difference": difference, "kl": float(torch.cat(divergences).mean())}
