"""Liger's kernels for what stands between the linear layers, and a loss that never makes the logits.

Norms, gated activations and rotary embeddings become one kernel each where liger-kernel knows the architecture. The head's
product with the vocabulary, the softmax and the loss become one function that takes a few hundred tokens at a time and leaves
the gradient of the hidden states only: 8,192 tokens and a vocabulary of 128,256 words make 2 GB of logits and as much of
gradients. For that the head is exchanged for one that hands the hidden states on, which fits every model whose logits are its
head's output and nothing more. Of a head in codes some thousand words at a time are made dense, never all. Liger's kernels run on
CUDA devices; the package is in the extra `gpu`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from qwha_cli.errors import UsageError
from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.wide_linear import wide_gradient, wide_product
from qwha_cli.quant.linear import QuantizedLinear

Kernels = Literal["auto", "torch", "liger"]
# An eighth of a batch's tokens at once, so that its logits stay small beside its activations. With less than 256 products are
# narrow, more than 1024 gain nothing: 8,192 tokens and 128,256 words take 41 ms by 128, 23.7 by 256, 22.0 by 1024 on an H100.
_LEAST_AT_ONCE, _MOST_AT_ONCE = 256, 1024
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
    odd = [f"has {name}" for name in _AFTER_THE_HEAD if getattr(config, name, None) not in (None, 1, 1.0)]
    if _trains_its_head(model):
        odd.append("trains its head")
    parts = [
        "Liger's norms, activations and rotations" if layers else "transformers' layers: Liger does not know this architecture",
        f"logits in full: the model {odd[0]}" if odd else "a loss without logits, with Liger's kernel",
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

    def __init__(self, head: nn.Linear | QuantizedLinear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states as they are."""
        return hidden

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Minus the summed log-probabilities of tokens. Never waits for the device.

        Args:
            hidden: (n, hidden), floating, on a CUDA device; where autocast is on the product is computed in its dtype.
            targets: (n,) int64; places with -100 count nothing.

        Returns:
            float32 scalar, nats; differentiable in `hidden` alone.
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        bias = None if self.head.bias is None else self.head.bias.detach().to(dtype)
        with torch.autocast(kind, enabled=False):
            if isinstance(self.head, QuantizedLinear):
                weight, backend = self.head.operand(dtype), self.head.backend
            else:
                weight, backend = self.head.weight.detach().to(dtype), "auto"
            loss: Tensor = _FrozenHeadLoss.apply(hidden.to(dtype), weight, bias, targets, backend)
        return loss


class _FrozenHeadLoss(torch.autograd.Function):
    """The summed cross entropy of hidden Wᵀ + b, a few hundred tokens at a time, which leaves d loss / d hidden and nothing else.

    Liger's own function of this kind asks the device how many labels count, though a sum does not need it: whoever waits for the
    device cannot be captured in a CUDA graph. So only its kernel is taken, which turns logits into their gradient in place.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor | Codes,
        bias: Tensor | None,
        targets: Tensor,
        backend: Requested,
    ) -> Tensor:
        wanted: bool = ctx.needs_input_grad[0]
        losses = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        for part in _parts(hidden.shape[0]):
            logits = (
                hidden[part] @ weight.mT if isinstance(weight, Tensor) else wide_product(hidden[part], weight, backend=backend)
            )
            if bias is not None:
                logits += bias
            _cross_entropy_in_place(logits, targets[part], losses[part], gradients=wanted)
            if gradient is not None:
                if isinstance(weight, Tensor):
                    torch.mm(logits, weight, out=gradient[part])
                else:
                    gradient[part] = wide_gradient(logits, weight, backend=backend)
            # else the next part's would be made beside them
            del logits
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # noqa: ANN401  # pyright: ignore
        (gradient,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None
        scaled = torch.empty_like(gradient)
        for part in _parts(len(gradient)):
            # in float32: half precision would round the factor itself, 1 / number of tokens, the same way for every token
            scaled[part] = gradient[part].float().mul_(grad_outputs[0])
        return scaled, None, None, None, None


def _parts(tokens: int) -> list[slice]:
    size = min(max(-(-tokens // 8), _LEAST_AT_ONCE), _MOST_AT_ONCE)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _cross_entropy_in_place(logits: Tensor, targets: Tensor, losses: Tensor, *, gradients: bool) -> None:
    """Write the loss of every row, and put the gradient of its sum in the logits' place."""
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel  # pyright: ignore

    words = logits.shape[1]
    liger_cross_entropy_kernel[(logits.shape[0],)](
        X_ptr=logits, X_stride=logits.stride(0), Y_ptr=targets, Y_stride=targets.stride(0), weight_ptr=None,
        loss_ptr=losses, z_loss_ptr=None, loss_stride=losses.stride(0),
        token_accuracy_ptr=None, token_accuracy_stride=0, predicted_tokens_ptr=None, predicted_tokens_stride=0,
        n_cols=words, n_non_ignore=1, sum_non_ignore_weight=1, weight_sum=0.0, ignore_index=-100,
        lse_square_scale=0.0, label_smoothing=0.0, reduction="sum", softcap=None,
        RETURN_Z_LOSS=False, RETURN_TOKEN_ACCURACY=False, RETURN_PREDICTED_TOKENS=False,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, 1 << (words - 1).bit_length()), HAS_WEIGHT=False, HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=gradients, num_warps=32,
    )  # fmt: skip


@contextlib.contextmanager
def fused_head(model: PreTrainedModel) -> Generator[FusedHead]:
    """Put a FusedHead in the head's place for the block."""
    head = cast("nn.Linear | QuantizedLinear", model.get_output_embeddings())
    fused = FusedHead(head)
    model.set_output_embeddings(fused)
    try:
        yield fused
    finally:
        model.set_output_embeddings(head)


def _trains_its_head(model: nn.Module) -> bool:
    head = cast("nn.Module | None", model.get_output_embeddings()) if isinstance(model, PreTrainedModel) else None
    return head is not None and any(parameter.requires_grad for parameter in head.parameters())


def _lacking(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"Liger's kernels run on CUDA devices, not on {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def _knows(model_type: str) -> bool:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # pyright: ignore

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN
