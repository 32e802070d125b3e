"""One layer as the init stage sees it: the 16-bit weight, the base's module, and the start that is computed for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from qwha_cli.adapters.base_layer import dense_linear
from qwha_cli.adapters.build import Start
from qwha_cli.errors import ArtifactError
from qwha_cli.kernels.low_rank import LowRank
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.wht import wht
from qwha_cli.models.targets import Target
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import Basis


@dataclass(frozen=True)
class InitLayer:
    """One target of the init stage.

    Attributes:
        target: The layer's name and place.
        module: The base's module, quantized or not.
        weight: (out, in) of the 16-bit model, in the weight basis, anywhere.
    """

    target: Target
    module: nn.Module
    weight: Tensor

    @property
    def name(self) -> str:
        """The module's full name."""
        return self.target.name

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def basis(self) -> Basis:
        """Where the base's codes are."""
        return self.module.basis if isinstance(self.module, QuantizedLinear) else "weight"

    def check(self, digest: object, folder: Path) -> None:
        """Refuse codes that are not those that the quantize stage wrote.

        Raises:
            ArtifactError: They are not.
        """
        if isinstance(self.module, QuantizedLinear) and self.module.packed().digest() != digest:
            raise ArtifactError(
                f"the codes of layer {self.name} are damaged: their digest is not the one in layers.jsonl",
                where=str(folder),
                remedy="quantize the model again with `qwha quantize RECIPE --force`",
            )

    def on(self, device: torch.device) -> InitLayer:
        """The layer on a device; a copy unless it is there already."""
        if self.weight.device == device:
            return self
        return InitLayer(self.target, copy.deepcopy(self.module).to(device), self.weight.to(device))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The base's weight (out, in) in its own basis."""
        if isinstance(self.module, QuantizedLinear):
            return self.module.dense(dtype)
        return cast(nn.Linear, self.module).weight.detach().to(dtype)

    def pair(self, basis: Basis, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The 16-bit weight and the base's, (out, in) each, both in one basis; W H and Q̂, W and Q̂ Hᵀ, and so on."""
        weight = self.weight.detach().to(device=device, dtype=dtype)
        dense = self.dense(torch.float32)
        if self.basis == "hadamard" and basis == "weight":
            dense = wht(dense, transpose=True)
        dense = dense.to(device=device, dtype=dtype)
        if basis == "weight":
            return weight, dense
        return wht(weight), dense if self.basis == "hadamard" else wht(dense)

    def corrected(self, start: Start, *, scale: float, device: torch.device, dtype: torch.dtype) -> nn.Linear:
        """A plain linear layer that computes what the layer computes with its adapter."""
        base = self.dense(torch.float32).to(device)
        update = start.to(device).dense(torch.float32) * scale
        # added where both are, so that one transform serves both
        if self.basis == "hadamard" and isinstance(start, SparseRows):
            merged = wht(base + update, transpose=True)
        else:
            base = wht(base, transpose=True) if self.basis == "hadamard" else base
            merged = base + (wht(update, transpose=True) if isinstance(start, SparseRows) else update)
        return dense_linear(merged.to(dtype), getattr(self.module, "bias", None))


def start_tensors(name: str, start: Start) -> dict[str, Tensor]:
    """A start as tensors that can be kept in a file, by `name.part`."""
    if isinstance(start, LowRank):
        return {f"{name}.a": start.a, f"{name}.b": start.b}
    return {f"{name}.row_starts": start.row_starts, f"{name}.columns": start.columns, f"{name}.values": start.values}


def start_of(tensors: dict[str, Tensor], layer: InitLayer) -> Start:
    """The start of a layer among the tensors of `start_tensors`."""
    name = layer.name
    if f"{name}.a" in tensors:
        return LowRank(tensors[f"{name}.a"], tensors[f"{name}.b"])
    return SparseRows(tensors[f"{name}.row_starts"], tensors[f"{name}.columns"], tensors[f"{name}.values"], layer.shape)
