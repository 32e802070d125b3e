"""Models of published shapes with random weights, in every form that the benchmarks of speed and memory compare.

Nothing here is measured. Random codes, random places and small random values: speed and memory do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwha_cli.adapters.build import add_adapter, as_stored, freeze_adapter
from qwha_cli.kernels.low_rank import LowRank
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.models.random import random_config
from qwha_cli.models.targets import find_targets
from qwha_cli.quant.embedding import put_vocabulary, vocabulary_of
from qwha_cli.quant.layout import tensor_shapes
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import Basis, PackedWeight, QuantFormat
from qwha_cli.quant.swap import replace
from qwha_cli.quantizers.vocabulary import vocabulary_options

DTYPE = torch.bfloat16


def dense_model(shape: str, *, device: str, dtype: torch.dtype = DTYPE) -> PreTrainedModel:
    """A causal language model of a shape, its weights drawn on the device."""
    config = random_config(shape)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(std=0.02)
    _rebuild_buffers(model, device)
    model.tie_weights()
    model.requires_grad_(False)
    return cast(PreTrainedModel, model)


def _rebuild_buffers(model: nn.Module, device: str) -> None:
    """Rotary frequencies are computed when a module is built, which on the meta device gives nothing."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config)  # pyright: ignore
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def random_packed(
    shape: tuple[int, int], *, bits: int, group: int, basis: Basis, device: str, zero_bits: int | None = None
) -> PackedWeight:
    """Random codes whose values have about the size of a layer's weights; zero points are fine by default."""
    form = QuantFormat("gptq", bits, group, False, basis, zero_bits=zero_bits or max(bits, 4))
    return random_codes(shape, form, scale=0.02, device=device)


def random_codes(shape: tuple[int, int], form: QuantFormat, *, scale: float, device: str) -> PackedWeight:
    """Random codes and zero points, all groups of one scale."""
    made: dict[str, Tensor] = {}
    sizes = tensor_shapes("gptq", shape=shape, bits=form.bits, zero_bits=form.zero_bits, group_size=form.group_size)
    for name, (size, dtype) in sizes.items():
        if dtype == torch.int32:
            made[name] = torch.randint(-(2**31), 2**31, size, device=device, dtype=torch.int64).to(torch.int32)
        else:
            made[name] = torch.full(size, scale, device=device, dtype=dtype)
    return PackedWeight(made, form, shape)


def random_rows(shape: tuple[int, int], *, rank: int, device: str) -> SparseRows:
    """Rank · (in + out) small values, the same number in every row but for one, at random columns."""
    out, size = shape
    count = rank * (out + size) // out
    columns = torch.rand(out, size, device=device).topk(count, dim=1).indices.sort(dim=1).values
    starts = torch.arange(out + 1, device=device, dtype=torch.int32) * count
    values = 1e-3 * torch.randn(out * count, device=device)
    return SparseRows(starts, columns.flatten().to(torch.int32), values, shape)


def linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers that are quantized and adapted, by name."""
    modules = dict(model.named_modules())
    return {target.name: modules[target.name] for target in find_targets(model, kinds=(nn.Linear, QuantizedLinear))}


def exchange(model: PreTrainedModel, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put another module in the place of every linear layer of the decoder, one after the other."""
    for name, layer in linears(model).items():
        replace(model, name, make(cast(nn.Linear, layer)))


def quantized_model(shape: str, *, bits: int, group: int, basis: Basis, device: str, embedding_bits: int = 16) -> PreTrainedModel:
    """A model whose decoder's linear layers have random codes; with 8 bits embedding and head have some too."""
    # never dense as a whole: the linear layers stay on the meta device until they are codes
    config = random_config(shape)
    config.dtype = DTYPE
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa")

    def packed(layer: nn.Linear) -> nn.Module:
        size = (layer.out_features, layer.in_features)
        return QuantizedLinear.from_packed(random_packed(size, bits=bits, group=group, basis=basis, device=device))

    exchange(cast(PreTrainedModel, model), packed)
    if embedding_bits == 8:
        quantize_vocabulary(cast(PreTrainedModel, model), group=group, device=device)
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.ones if parameter.dim() == 1 else lambda *a, **k: 0.02 * torch.randn(*a, **k)
            setattr(module, name, nn.Parameter(value(parameter.shape, device=device, dtype=DTYPE), requires_grad=False))
    _rebuild_buffers(model, device)
    model.tie_weights()
    return cast(PreTrainedModel, model)


def quantize_vocabulary(model: PreTrainedModel, *, group: int, device: str) -> None:
    """Give a model's embedding and head random codes of the product's kind, about as large as weights are."""
    vocabulary = vocabulary_of(model, format=vocabulary_options(group).format)
    shapes = {name: model.get_parameter(f"{name}.weight").shape for name in vocabulary.owners}
    codes = {n: random_codes((s[0], s[1]), vocabulary.format, scale=2e-4, device=device) for n, s in shapes.items()}
    put_vocabulary(model, vocabulary, codes)


def with_sparse_adapter(model: PreTrainedModel, *, rank: int, device: str, frozen: bool = False) -> nn.Module:
    """The product's adapter at random places on every linear layer, under peft: trainable, or as it is loaded for generation."""
    layers = linears(model)
    start = {n: random_rows((x.out_features, x.in_features), rank=rank, device=device) for n, x in layers.items()}  # pyright: ignore
    if not frozen:
        return add_adapter(model, rank=rank, scale=1.0, targets=list(layers), start=start, store="float32")
    stored = {name: as_stored(rows, "bfloat16") for name, rows in start.items()}
    adapted = add_adapter(model, rank=rank, scale=1.0, targets=list(layers), start=stored)
    freeze_adapter(adapted)
    return adapted


def with_lora(model: PreTrainedModel, *, rank: int) -> nn.Module:
    """A LoRA on every linear layer of the decoder, in float32, trainable: peft's own, or the product's on packed codes."""
    layers = linears(model)
    if all(isinstance(layer, QuantizedLinear) for layer in layers.values()):
        start = {name: _factors(cast(QuantizedLinear, layer), rank) for name, layer in layers.items()}
        return add_adapter(model, rank=rank, scale=1.0, targets=list(layers), start=start)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=list(linears(model)))
    return get_peft_model(model, config)


def _factors(layer: QuantizedLinear, rank: int) -> LowRank:
    device = layer.get_buffer("scales").device
    a = torch.randn(rank, layer.in_features, device=device) / layer.in_features**0.5
    return LowRank(a, torch.zeros(layer.out_features, rank, device=device))
