"""Liger's kernels for what stands between the linear layers, and a loss that never makes the logits.

Norms, gated activations and rotary embeddings become one kernel each where liger-kernel knows the architecture. The head's
product with the vocabulary, the softmax and the loss become one function that takes a few hundred tokens at a time and leaves
the gradient of the hidden states only: 8,192 tokens and a vocabulary of 128,256 words make 2 GB of logits and as much of
gradients. For that the head is exchanged for one that hands the hidden states on, which fits every model whose logits are its
head's output and nothing more. Liger's kernels run on CUDA devices; the package is in the extra `gpu`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwha_cli.errors import UsageError

Kernels = Literal["auto", "torch", "liger"]
# fewer make narrow products: 16 tokens a part took 17 of a small batch's 61 milliseconds on an H100 (docs/results/speed.md)
_TOKENS_AT_ONCE = 256
# what some architectures do to the head's output before it is a logit
_AFTER_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale", "lm_head_multiplier")


@dataclass(frozen=True)
class KernelsChoice:
    """What was chosen, and why.

    Attributes:
        layers: Whether norms, activations and rotations are Liger's.
        loss: Whether the loss is Liger's fused one.
        reason: One sentence for the run's notes.
    """

    layers: bool
    loss: bool
    reason: str


def choose_kernels(requested: Kernels, *, model: nn.Module, device: torch.device) -> KernelsChoice:
    """Decide between Liger's kernels and transformers' own code.

    Args:
        requested: What the recipe says; `auto` takes Liger's where they run.
        model: A causal language model of transformers, not wrapped.
        device: Where it will be trained.

    Raises:
        UsageError: `liger` was asked for and cannot be had.
    """
    if requested == "torch":
        return KernelsChoice(False, False, "layers between the linear ones by transformers, as the recipe asks")
    lacking = _lacking(device)
    if lacking is not None:
        if requested == "liger":
            raise UsageError(
                f"Liger's kernels cannot be used: {lacking}", where="train.kernels", remedy='use auto, or pip install "qwha[gpu]"'
            )
        return KernelsChoice(False, False, f"layers between the linear ones by transformers: {lacking}")
    config = getattr(model, "config", None)
    layers = _knows(getattr(config, "model_type", ""))
    odd = [name for name in _AFTER_THE_HEAD if getattr(config, name, None) not in (None, 1, 1.0)]
    parts = [
        "Liger's norms, activations and rotations" if layers else "transformers' layers: Liger does not know this architecture",
        f"logits in full: the model has {odd[0]}" if odd else "Liger's fused loss",
    ]
    return KernelsChoice(layers, not odd, "; ".join(parts))


def apply_to_layers(model: nn.Module) -> None:
    """Exchange norms, activations and rotary embeddings of a model for Liger's, in place and for good."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore

    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


class FusedHead(nn.Module):
    """Stands where a language model's head stood and hands its input on; `summed_loss` does what comes after.

    Args:
        head: The head, whose weight is shared, not copied.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias: Tensor | None = head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states as they are."""
        return hidden

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Minus the summed log-probabilities of tokens.

        Args:
            hidden: (n, hidden), floating, on a CUDA device; where autocast is on the product is computed in its dtype.
            targets: (n,) int64.

        Returns:
            float32 scalar, nats; differentiable in `hidden`, and in the head's weight where that requires a gradient.
        """
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction  # pyright: ignore

        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # Liger's memory unit: logits of so many numbers a token at once; by itself it takes 512 tokens in 32 parts
        parts = -(-max(1, hidden.shape[0]) // _TOKENS_AT_ONCE)
        budget = max(1, self.weight.shape[0] // (self.weight.shape[1] * parts))
        with torch.autocast(kind, enabled=False):
            # positional: input, weight, target, bias, class weights, ignored label, z-loss, smoothing, reduction, cap, then
            # switches for what is not wanted, and the budget
            found = LigerFusedLinearCrossEntropyFunction.apply(
                hidden.to(dtype), self.weight.to(dtype), targets, bias, None, -100, 0.0, 0.0, "sum", None,
                False, None, False, False, False, None, None, budget,
            )  # fmt: skip
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)


@contextlib.contextmanager
def fused_head(model: PreTrainedModel) -> Generator[FusedHead]:
    """Put a FusedHead in the head's place for the block."""
    head = cast(nn.Linear, model.get_output_embeddings())
    fused = FusedHead(head)
    model.set_output_embeddings(fused)
    try:
        yield fused
    finally:
        model.set_output_embeddings(head)


def _lacking(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"Liger's kernels run on CUDA devices, not on {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def _knows(model_type: str) -> bool:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # pyright: ignore

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN
