"""Attention over sequences that lie end to end in one row: block-diagonal and causal, without padding and without a mask.

    out_i = sum_j softmax_j(scale q_i k_j) v_j    over j of i's sequence with i - window < j <= i

Where sequences begin is told by cumulative lengths, as transformers hands them through to flash attention (`cu_seq_lens_q`,
`max_length_q`, ...), so nothing is looked up on the device and a CUDA graph can be recorded. The kernel is torch's own flash
attention, `torch.nn.attention.varlen`; the package flash-attn is not needed. Sequences of one length are a batch like any other,
for which torch has faster kernels. A model is switched for a block of code, to a name
of ours in transformers' AttentionInterface. transformers makes no mask for a name that it knows no mask function of, and then
does not search the positions for packed sequences either, which would wait for the device: so none is registered.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from qwha_cli.errors import UsageError

Attention = Literal["auto", "varlen", "padded"]
VARLEN = "qwha_varlen"
REFERENCE = "qwha_varlen_reference"

_LARGEST_HEAD = 256
_HALF = (torch.bfloat16, torch.float16)
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# what some architectures do to attention scores that flash attention of torch cannot
_SOFTCAPS = ("attn_logit_softcapping", "attention_logits_soft_cap", "attn_logit_softcap")
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# arguments that other attention functions know and this one would have to ignore
_FOREIGN = ("softcap", "s_aux", "position_bias", "cache")


class VarlenKernel(Protocol):
    """Attention of T tokens, given as (T, heads, head_dim); k and v may have fewer heads, each for a group of q's."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, *, longest: int, scale: float, window: int | None
    ) -> Tensor:
        """Return (T, heads of q, head_dim), in the dtype of `q`."""
        ...


@dataclass(frozen=True)
class AttentionChoice:
    """What was chosen, and why.

    Attributes:
        varlen: Whether sequences lie end to end in one row; else batches are padded, or packed, under transformers' attention.
        reason: One sentence for the run's notes.
    """

    varlen: bool
    reason: str


def choose_attention(requested: Attention, *, model: nn.Module, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """Decide between one row without padding and padded batches.

    Args:
        requested: What the recipe says; `auto` takes the row without padding where it can be had.
        model: A causal language model of transformers, not wrapped.
        device: Where it will be trained.
        dtype: Of its matrix products: autocast's, or the model's own.

    Raises:
        UsageError: `varlen` was asked for and cannot be had.
    """
    if requested == "padded":
        return AttentionChoice(False, "padded batches, as the recipe asks")
    obstacle = device_obstacle(device, dtype=dtype) or model_obstacle(model)
    if obstacle is None:
        return AttentionChoice(True, "sequences end to end without padding, attention by torch's varlen_attn")
    if requested == "varlen":
        raise UsageError(
            f"attention without padding cannot be used: {obstacle}",
            where="train.attention",
            remedy="use auto, which takes it where it can be had, or padded",
        )
    return AttentionChoice(False, f"padded batches: {obstacle}")


def device_obstacle(device: torch.device, *, dtype: torch.dtype) -> str | None:
    """Why torch's kernel does not run on a device in a dtype, in words; None if it does."""
    if device.type != "cuda":
        return f"torch's varlen_attn runs on CUDA devices, not on {device.type}"
    if dtype not in _HALF:
        return f"torch's varlen_attn computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"torch's varlen_attn needs compute capability 8.0, more than {torch.cuda.get_device_name(device)} has"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without flash attention"
    if not {"scale", "window_size"} <= _varlen_parameters():
        return f"varlen_attn of torch {torch.__version__} has no scale or no window"
    return None


def model_obstacle(model: nn.Module) -> str | None:
    """What in a model's architecture torch's kernel cannot compute, in words; None if nothing is known."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or not (
        # the first is transformers' word that all arguments reach the attention function
        model._supports_attention_backend and model._supports_flash_attn  # pyright: ignore[reportPrivateUsage]
    ):
        return f"{name} does not hand the sequences' lengths on to its attention"
    if model.config.get_text_config() is not config:
        return f"{name} is made of several models"
    unknown = {str(kind) for kind in getattr(config, "layer_types", None) or ()} - _KNOWN_LAYERS
    if unknown or model._is_stateful or getattr(config, "attention_chunk_size", None):  # pyright: ignore[reportPrivateUsage]
        return f"{name} has layers in which sequences of one row are not kept apart ({', '.join(sorted(unknown)) or 'recurrent'})"
    for attributes, what in ((_SOFTCAPS, "caps attention scores"), (_DROPOUTS, "drops attention at random")):
        if any(getattr(config, attribute, None) for attribute in attributes):
            return f"{name} {what}"
    if any("sink" in parameter.rpartition(".")[2] for parameter, _ in model.named_parameters()):
        return f"{name} has attention sinks"
    return _heads_obstacle(model)


def _heads_obstacle(model: PreTrainedModel) -> str | None:
    layers = [module for module in model.modules() if hasattr(module, "is_causal")]
    if not layers or not all(layer.is_causal for layer in layers):
        return f"{type(model).__name__} has attention that is not causal"
    if getattr(model.config, "v_head_dim", None) is not None:
        return f"{type(model).__name__} has values of another size than keys"
    usual = model.config.hidden_size // model.config.num_attention_heads
    for size in sorted({int(getattr(layer, "head_dim", usual)) for layer in layers}):
        if size > _LARGEST_HEAD or size % 8:
            return f"attention heads have {size} numbers, and torch's varlen_attn takes multiples of 8 up to {_LARGEST_HEAD}"
    return None


@contextlib.contextmanager
def varlen_attention(model: PreTrainedModel, *, reference: bool = False) -> Generator[None]:
    """Switch a model to attention over flat rows for the block, and exactly back after.

    In the block the forward takes one row with `cu_seq_lens_q`, `cu_seq_lens_k` (N + 1,) int32 and `max_length_q`, `max_length_k`
    (int), and neither attention_mask nor cache; and `equal_length` (int) where all sequences have that many tokens.

    Args:
        model: A causal language model of transformers, not wrapped.
        reference: Take `varlen_reference`, on any device and in any dtype, and not torch's kernel: for tests.

    Raises:
        UsageError: transformers cannot switch the attention of this model.
    """
    name = REFERENCE if reference else VARLEN
    AttentionInterface.register(name, functools.partial(_attend, kernel=varlen_reference if reference else varlen_torch))
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    # the public setter of a config writes into its sub-configs, whose former values would be lost
    attribute = "_attn_implementation_internal"
    before = [(config, getattr(config, attribute)) for config in configs.values()]
    try:
        model.set_attn_implementation(name)
        if any(getattr(config, attribute) != name for config in configs.values()):
            raise _cannot(f"transformers cannot switch the attention of {type(model).__name__}")
        yield
    finally:
        for config, value in before:
            setattr(config, attribute, value)


def varlen_torch(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, *, longest: int, scale: float, window: int | None
) -> Tensor:
    """Attention by torch's flash attention, on a CUDA device in 16 bits; the same result as `varlen_reference`.

    Args:
        q: (T, heads, head_dim).
        k: (T, heads of k, head_dim); heads is a multiple of heads of k.
        v: As `k`.
        cu_seq_lens: (N + 1,) int32, from 0 to T.
        longest: At least the length of every sequence.
        scale: Factor on the products of q and k.
        window: Tokens that each sees, itself included; None for all before it.
    """
    from torch.nn.attention.varlen import varlen_attn

    if q.dtype not in _HALF or not q.is_cuda:
        raise _cannot(f"torch's varlen_attn was given {q.dtype} on {q.device.type}, and takes 16 bits on CUDA")
    # k and v are not repeated; torch before this argument took fewer heads without being told
    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and "enable_gqa" in _varlen_parameters() else {}
    left = -1 if window is None or window >= longest else window - 1
    found = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, scale=scale, window_size=(left, 0), **grouped)
    assert isinstance(found, Tensor)
    return found


def varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, *, longest: int, scale: float, window: int | None
) -> Tensor:
    """The same with a mask of (T, T), in at least float32: what `varlen_torch` is compared with. `longest` is not used."""
    del longest
    dtype = torch.promote_types(q.dtype, torch.float32)
    place = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seq_lens[1:], place.to(cu_seq_lens.dtype), right=True)
    behind = place[:, None] - place[None, :]
    seen = (sequence[:, None] == sequence[None, :]) & (behind >= 0)
    if window is not None:
        seen &= behind < window
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1).to(dtype) for one in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.to(dtype), k) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, v).to(q.dtype)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: VarlenKernel,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    equal_length: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers' layers call it: (1, heads, T, head_dim) in, (1, T, heads, head_dim) out."""
    if cu_seq_lens_q is None or max_length_q is None:
        raise _cannot("the lengths of the sequences did not reach the attention")
    if attention_mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise _cannot("it takes one row, without attention_mask and without cache")
    foreign = [name for name in _FOREIGN if others.get(name) is not None]
    if dropout or foreign or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _cannot(
            f"{type(module).__name__} wants {', '.join(foreign) or ('dropout' if dropout else 'sight of later tokens')}"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # as autocast does for torch's own attention; rotations may have made float32 of q and k
        query, key, value = (one.to(torch.get_autocast_dtype(device)) for one in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if equal_length is not None and (sliding_window is None or sliding_window >= equal_length):
        return _attend_equal(query, key, value, length=equal_length, scale=scale), None
    q, k, v = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
    found = kernel(
        q,
        k,
        v,
        cu_seq_lens_q,
        longest=max_length_q,
        scale=scale,
        window=sliding_window,
    )
    return found.unsqueeze(0), None


def _attend_equal(query: Tensor, key: Tensor, value: Tensor, *, length: int, scale: float) -> Tensor:
    """The same for sequences of one length, by whichever of torch's kernels is the fastest for a batch of them."""

    def batch(x: Tensor) -> Tensor:
        return x.squeeze(0).unflatten(1, (-1, length)).transpose(0, 1)

    q, k, v = batch(query), batch(key), batch(value)
    found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return found.transpose(1, 2).flatten(0, 1).unsqueeze(0)


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _cannot(cause: str) -> UsageError:
    return UsageError(f"attention without padding: {cause}", where="train.attention", remedy="set train.attention: padded")
