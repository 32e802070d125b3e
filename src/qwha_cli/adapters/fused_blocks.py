"""Decoder blocks whose norms and gated activation are done in the pass over memory that transforms their result.

Between a norm and q, k and v, and between a norm and gate and up, lies a tensor that in the Hadamard basis only the transform
reads; so does what gate and up make for down. kernels/fused_wht.py makes the transform without it. In a block of the usual form,

    h = x + attention(norm(x)),    y = h + mlp(norm'(h)),    mlp(u) = down(silu(gate(u)) ⊙ up(u)),

the first sum, and the additions of gradients at both sums, are done in the same passes. The projections get a stand-in for their
input, whose transform is known. A block is switched for the time of a training; where a projection reads its input itself, as
without adapters, merged or in another basis, it computes as its architecture says, and an activation whose size makes one pass
slower than two is left to whoever does it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.kernels.fused_wht import choose_fused, gate_wht, norm_wht
from qwha_cli.kernels.shared_wht import stand_in
from qwha_cli.kernels.spectral_linear import computing_dtype
from qwha_cli.kernels.wht_tiles import gate_pays

# architectures whose block is of the form above, with a norm that multiplies by its weight and adds nothing to it
_KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3"})


@dataclass(frozen=True)
class FusedChoice:
    """What was chosen, and why.

    Attributes:
        fused: Whether blocks are switched.
        reason: One sentence for the run's notes.
    """

    fused: bool
    reason: str


def choose_fused_blocks(model: nn.Module, *, wanted: bool, device: torch.device, dtype: torch.dtype) -> FusedChoice:
    """Decide whether a model's blocks are switched.

    Args:
        model: A causal language model of transformers, not wrapped, with its adapters.
        wanted: Whether the recipe leaves it to us.
        device: Where it will be trained.
        dtype: In which the adapted layers compute.
    """
    if not wanted:
        return FusedChoice(False, "norms and transforms apart, as the recipe asks")
    obstacle = _obstacle(model, device=device, dtype=dtype)
    if obstacle is not None:
        return FusedChoice(False, f"norms and transforms apart: {obstacle}")
    return FusedChoice(True, "norms and activations in the passes that transform them")


def _obstacle(model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> str | None:
    blocks = _blocks(model)
    if not blocks:
        return f"the blocks of {type(model).__name__} are not known"
    if not any(_fits(block) for block in blocks):
        return "no block has adapters on all its projections, in the Hadamard basis"
    choice = choose_fused("auto", size=cast(Any, model).config.hidden_size, dtype=dtype, device=device)
    return None if choice.name == "triton" else choice.reason


@contextlib.contextmanager
def fused_blocks(model: PreTrainedModel) -> Generator[None]:
    """Switch all blocks of a model for the time of the block, and exactly back after.

    Args:
        model: A causal language model of transformers, not wrapped, with its adapters. Blocks of which it knows nothing stay.
    """
    switched = _blocks(model)
    kinds = [type(block) for block in switched]
    try:
        for block, kind in zip(switched, kinds, strict=True):
            block.__class__ = _fused(kind)
        yield
    finally:
        for block, kind in zip(switched, kinds, strict=True):
            block.__class__ = kind


@lru_cache(maxsize=16)
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of blocks whose forward is ours where it can be.

    A class, because transformers checkpoints in `__call__` or around the `forward` of a class, as its version has it.
    """

    def forward(self: nn.Module, hidden_states: Tensor, **others: Any) -> Tensor:  # noqa: ANN401
        # asked each time: adapters can be switched off between two forwards
        if _fits(self):
            return _forward(cast(Any, self), hidden_states, others)
        own: Tensor = cast(Any, kind).forward(self, hidden_states, **others)
        return own

    made: type[nn.Module] = type(f"Fused{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})
    return made


def _fits(block: nn.Module) -> bool:
    """Whether all projections read transforms only, and nothing else that would be left out wants a gradient."""
    parts = cast(Any, block)
    if any(norm.weight.requires_grad for norm in (parts.input_layernorm, parts.post_attention_layernorm)):
        return False
    readers = [getattr(parts.self_attn, f"{name}_proj") for name in "qkv"]
    readers += [parts.mlp.gate_proj, parts.mlp.up_proj, parts.mlp.down_proj]
    return all(isinstance(reader, SpectralLinear) and reader.reads_transform() for reader in readers)


def _forward(block: Any, x: Tensor, others: Mapping[str, Any]) -> Tensor:  # noqa: ANN401
    attention, mlp = block.self_attn, block.mlp
    read, x = _normed(block.input_layernorm, x, None, (attention.q_proj, attention.k_proj, attention.v_proj))
    attended, _ = attention(hidden_states=read, **others)
    read, h = _normed(block.post_attention_layernorm, x, attended, (mlp.gate_proj, mlp.up_proj))
    if not gate_pays(mlp.down_proj.in_features):
        return h + mlp(read)
    gate, up = mlp.gate_proj(read), mlp.up_proj(read)
    # the norm's result is not needed while the widest tensors of the block are made
    del read
    z = gate_wht(gate, up, dtype=computing_dtype(gate), fp8=mlp.down_proj.reads_fp8(gate))
    return h + mlp.down_proj(stand_in(z, gate.dtype))


def _normed(norm: Any, x: Tensor, add: Tensor | None, readers: Sequence[SpectralLinear]) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    add = None if add is None else add.to(x.dtype)
    fp8 = all(reader.reads_fp8(x) for reader in readers)
    z, h = norm_wht(x, norm.weight, eps=norm.variance_epsilon, dtype=computing_dtype(x), add=add, fp8=fp8)
    return stand_in(z, x.dtype), h


def _blocks(model: nn.Module) -> list[nn.Module]:
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in _KNOWN or getattr(config, "hidden_act", None) != "silu":
        return []
    assert isinstance(model, PreTrainedModel)
    return list(cast(Any, model).get_decoder().layers)
