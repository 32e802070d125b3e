"""Gram matrices XᵀX of the inputs of linear layers, summed over all tokens and batches.

Layers that are given the same tensor (q, k and v; gate and up) share one Gram, found by the identity of their input, so it is
computed once. No mean and no factor 2: GPTQ and the adapter's initialisation only use ratios, and a plain sum adds up over
batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qwha_cli.errors import ModelError
from qwha_cli.quant.gram import Gram

_HALF = (torch.bfloat16, torch.float16)


class GramAccumulator:
    """Collects XᵀX for several linear layers while a model runs; a context manager that hooks in and out.

    Args:
        layers: Name to module; a module is given its input as first argument, (..., in_features).
        dtype: Of the sums, float32 or float64. Products of half-precision inputs are exact in it, on a GPU too: a sum rounded to
            bfloat16 would lose the small eigenvalues that GPTQ's factorisation needs.
        token_weights: Name to w (samples, length), so that the sum is Σ_t w_t x_t x_tᵀ; None for ones. Layers with a common input
            get the mean of theirs.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        dtype: torch.dtype = torch.float32,
        token_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._layers = dict(layers)
        self._token_weights = token_weights
        self._seen_samples = 0
        self._dtype = dtype
        self._grams: dict[str, Tensor] = {}  # leader -> sum
        self._leader: dict[str, str] = {}  # layer -> the first layer that had the same input
        # inputs of the running forward, kept alive so that a freed tensor's id cannot come back for another
        self._inputs: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> GramAccumulator:
        for name, module in self._layers.items():
            self._handles.append(module.register_forward_pre_hook(_Hook(self, name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    def next_batch(self) -> None:
        """Say that one forward pass is over: its inputs are added up; those of the next are compared among themselves."""
        samples = 0
        for leader in [name for name in self._inputs if self._leader[name] == name]:
            value = self._inputs[leader]
            samples = value.shape[0]
            # no autocast here: it would turn the product back into half precision
            with torch.autocast(value.device.type, enabled=False):
                self._add(leader, value.detach())
        self._seen_samples += samples
        self._inputs.clear()

    def _add(self, leader: str, value: Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1])
        if self._token_weights is not None:
            members = [self._token_weights[name] for name in self._inputs if self._leader[name] == leader]
            own = torch.stack(members)[:, self._seen_samples : self._seen_samples + value.shape[0]].mean(0)
            rows = (rows * own.to(rows.device).reshape(-1, 1).sqrt()).to(rows.dtype)
        if leader not in self._grams:
            self._grams[leader] = torch.zeros((rows.shape[1], rows.shape[1]), dtype=self._dtype, device=rows.device)
        if rows.dtype in _HALF and rows.device.type == "cuda" and self._dtype == torch.float32:
            # the tensor cores multiply half precision exactly and sum in float32, eight times as fast as float32 itself
            self._grams[leader] += torch.mm(rows.T, rows, out_dtype=torch.float32)
        else:
            rows = rows.to(self._dtype)
            self._grams[leader].addmm_(rows.T, rows)

    def result(self) -> dict[str, Gram]:
        """Layer name to its Gram; layers with a common input get the same object.

        Raises:
            ModelError: A layer was never run.
        """
        missing = [name for name in self._layers if name not in self._leader]
        if missing:
            raise ModelError(
                "calibration never reached this layer, so nothing is known of its inputs",
                where=f"layer {missing[0]}",
                remedy="leave it in 16 bits with adapter.exclude",
            )
        grams = {leader: Gram(matrix) for leader, matrix in self._grams.items()}
        return {name: grams[self._leader[name]] for name in self._layers}

    def see(self, name: str, value: Tensor) -> None:
        """Note one layer's input, (..., in_features); with token weights (samples, length, in_features)."""
        if name not in self._leader:
            same = next((other for other, seen in self._inputs.items() if seen is value), name)
            self._leader[name] = self._leader.get(same, name)
        self._inputs[name] = value


class _Hook:
    """A forward pre-hook that knows the name of its layer."""

    def __init__(self, owner: GramAccumulator, name: str) -> None:
        self._owner = owner
        self._name = name

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._owner.see(self._name, args[0])
