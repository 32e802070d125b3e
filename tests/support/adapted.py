"""What the adapter tests share: sparse rows, dense references, and quantized copies of a model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.kernels.hadamard import dense
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import Basis, PackedWeight, QuantFormat


def random_sparse(shape: tuple[int, int], *, seed: int = 0, density: float = 0.1) -> SparseRows:
    """Entries in every row, with values that a file in bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    mask[:, 3] = True  # at least one a row
    return SparseRows.from_mask(torch.randn(shape, generator=generator) * 0.1, mask).rounded(torch.bfloat16)


def quantize_linear(linear: nn.Linear, basis: Basis) -> QuantizedLinear:
    """4 bits in groups of 16, rounded to nearest between each group's minimum and maximum."""
    weight = linear.weight.detach().float()
    if basis == "hadamard":
        weight = (weight.double() @ dense(weight.shape[1])).float()
    groups = weight.reshape(len(weight), -1, 16)
    scales = ((groups.amax(2) - groups.amin(2)) / 15).half().float()
    zeros = (-groups.amin(2) / scales).round().clamp(0, 15)
    codes = ((groups / scales[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15).reshape(weight.shape)
    form = QuantFormat(method="rtn", bits=4, group_size=16, symmetric=False, basis=basis, zero_bits=4)
    return QuantizedLinear.from_packed(
        PackedWeight.from_codes(codes.byte(), scales.half(), zeros.byte(), format=form), linear.bias
    )


def base_of(kind: Literal["linear", "weight", "hadamard"], *, seed: int = 0, shape: tuple[int, int] = (80, 48)) -> nn.Module:
    """A layer with a bias: "linear", or quantized in the "weight" or "hadamard" basis."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linear = nn.Linear(shape[1], shape[0])
    return linear if kind == "linear" else quantize_linear(linear, kind)


def dense_weight(base: nn.Module) -> Tensor:
    """float64 (out, in) in the weight basis."""
    return base.weight_in_weight_basis(torch.float64) if isinstance(base, QuantizedLinear) else base.weight.detach().double()


def dense_delta(rows: SparseRows, scale: float) -> Tensor:
    """α F Hᵀ in float64."""
    return scale * rows.dense(torch.float64) @ dense(rows.shape[1]).T


def quantize_model(model: nn.Module, basis: Basis) -> nn.Module:
    """Every linear layer in the decoder blocks replaced by its quantized form; in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantize_linear(module, basis))
    return model


def fill(
    model: nn.Module, *, adapter: str = "default", seed: int = 0, std: float = 0.05, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Random values for all layers of an adapter, as if it had been trained and stored in a number format."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, SpectralLinear) and adapter in module.qwha_values:
            values = module.qwha_values[adapter]
            values.data = (torch.randn(values.shape, generator=generator) * std).to(dtype).float()
