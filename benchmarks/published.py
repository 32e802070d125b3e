"""The two layers that the method's authors published, as the rivals of bench_step.py: their arithmetic, operation by operation.

`PublishedLinear` is the paper's form (ΔW = F H⁻¹ added to the weight), `PublishedTransformedLinear` the authors' later one (the
base is carried into F's domain instead). Both stand on a base in GPTQ's format that is unpacked by tensor operations: words
shifted as 32-bit numbers, cut to 8 bits, scales and zero points looked up for every input through a list of groups. F has
float32 values, as trained, at places given by two 64-bit indices. Nothing is saved or recomputed but by autograd. Their
transform of n = K · 2^k numbers is a CUDA kernel over the 2^k in the tensor's own dtype, then a product with a table of order
K, which autocast takes to half precision, then a division; the kernel is replaced by one of ours that reads and writes the same
bytes once, on tensor cores. Their tables are built anew at each call, here they are kept. Read on 26 November 2026 in the
authors' repository, of July and of September 2025.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwha_cli.kernels.hadamard import base_matrix, plan
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.quant.packed import PackedWeight


class _Published(nn.Module):
    """What both forms share: the base, and F's values and places.

    Args:
        packed: Codes in GPTQ's layout that fill their words (2, 4 or 8 bits), with zero points as wide as they.
        rows: F (out, in).
        scaling: The factor that the authors call scaling.
    """

    def __init__(self, packed: PackedWeight, rows: SparseRows, *, scaling: float = 1.0) -> None:
        super().__init__()
        size, bits = packed.shape[1], packed.format.bits
        self.shape, self.scaling, self.most = packed.shape, scaling, (1 << bits) - 1
        self.codes, self.zeros = packed.tensors["qweight"], packed.tensors["qzeros"]
        self.scales = packed.tensors["scales"].bfloat16()
        self.shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=self.codes.device)
        self.group_of = torch.arange(size, device=self.codes.device, dtype=torch.int32) // packed.format.group_size
        self.places = torch.stack([rows.row_index().long(), rows.columns.long()])
        self.values = nn.Parameter(rows.values.clone())

    def base(self) -> Tensor:
        """Q̂ᵀ (in, out), bfloat16."""
        zeros = (self.zeros.unsqueeze(2) >> self.shifts).to(torch.int8)
        zeros = (zeros & self.most).reshape(self.scales.shape)
        codes = (self.codes.unsqueeze(1) >> self.shifts.unsqueeze(-1)).to(torch.int8) & self.most
        codes = codes.reshape(-1, codes.shape[2])
        return self.scales[self.group_of.long()] * (codes - zeros[self.group_of.long()])


class PublishedLinear(_Published):
    """y = x (Q̂ + s / sqrt(out) · F H⁻¹)ᵀ, F scattered into a dense float32 matrix."""

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in) to (..., out)."""
        base = self.base().T
        spectrum = torch.zeros(self.shape, dtype=self.values.dtype, device=x.device)
        spectrum[self.places[0], self.places[1]] = self.values
        delta = _table_transform(spectrum, transpose=True) / math.sqrt(self.shape[1]) * self.scaling / math.sqrt(self.shape[0])
        return nn.functional.linear(x, base + delta.to(x.dtype))


class PublishedTransformedLinear(_Published):
    """y = x H (Q̂ H + s / sqrt(out) · F)ᵀ / in, H of ±1; F added as a sparse tensor in coordinates."""

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in) to (..., out)."""
        size = self.shape[1]
        weight = _table_transform(self.base().T, transpose=False) * math.sqrt(size)
        weight += torch.sparse_coo_tensor(self.places, self.values * self.scaling * 1 / math.sqrt(self.shape[0]), self.shape)
        transformed = _table_transform(x, transpose=False) * math.sqrt(size)
        return nn.functional.linear(transformed, weight.to(x.dtype)) / size


def _table_transform(x: Tensor, *, transpose: bool) -> Tensor:
    """The orthonormal transform, (K, 2^k) after (K, 2^k): the kernel over 2^k first, then the table, or its transpose."""
    size = x.shape[-1]
    table = _table(size, x.device)
    scale = 1 / math.sqrt(size)
    if table is None:
        return _Sylvester.apply(x.contiguous(), scale)  # pyright: ignore
    blocks = x.reshape(*x.shape[:-1], table.shape[0], size // table.shape[0])
    done: Tensor = _Sylvester.apply(blocks.contiguous(), scale)  # pyright: ignore
    return ((table.T if transpose else table).to(done.dtype) @ done).reshape(x.shape)


@lru_cache(maxsize=16)
def _table(size: int, device: torch.device) -> Tensor | None:
    order = plan(size).base
    return None if order == 1 else base_matrix(order).float().to(device)


class _Sylvester(torch.autograd.Function):
    """X S · scale along the last axis, 2^k numbers; S is symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:  # noqa: ANN401
        ctx.scale = scale
        return sylvester(x, scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return sylvester(grad_outputs[0].contiguous(), ctx.scale), None


def sylvester(x: Tensor, scale: float, *, backend: Literal["auto", "torch"] = "auto") -> Tensor:
    """Sylvester's transform of the last axis times a factor, in x's dtype; on a GPU one pass over memory."""
    size = x.shape[-1]
    inner = 1 << (size.bit_length() // 2)
    if x.is_cuda and size >= 256 and backend == "auto":
        from published_triton import sylvester_rows

        return sylvester_rows(x, scale, inner=inner)
    left, right = (base_matrix(order).to(device=x.device, dtype=x.dtype) for order in (size // inner, inner))
    blocks = x.reshape(-1, size // inner, inner)
    with torch.autocast(x.device.type, enabled=False):
        return (left @ (blocks @ right)).reshape(x.shape) * scale
