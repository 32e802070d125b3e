"""One linear layer with sparse matrices F in the Hadamard domain added to its frozen weight.

    y = x W'ᵀ + b,    W' = Q̂ + α F Hᵀ  (nn.Linear, or codes in the weight basis)  or  (Q̂ + α F) Hᵀ  (codes in the Hadamard basis)

On the layer lie, by adapter name, `qwha_values` (nnz,) — the only trainable tensors, see values.py — and their places as the
stream of bytes `qwha_gaps` uint8, see kernels/gaps.py. Parameters are looked up at every call: peft re-creates them. The stream
is read when a layer is first used and when it is saved, so it stays in host memory whatever device the layer is on.

This file does not decide which layers get an adapter (model.py) nor how many entries where (places.py, initializers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from qwha_cli.adapters.adapted_linear import AdaptedLinear
from qwha_cli.adapters.base_layer import device_of
from qwha_cli.adapters.derived import Derived
from qwha_cli.adapters.spectral.config import Sizes
from qwha_cli.adapters.spectral.few_tokens import few_tokens
from qwha_cli.adapters.spectral.places import read_places
from qwha_cli.adapters.spectral.values import Values, frozen, moved, widen_trained
from qwha_cli.errors import ArtifactError
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.effective_weight import Transform, effective_weight
from qwha_cli.kernels.fp8 import E4M3
from qwha_cli.kernels.fp8_products import suits_fp8
from qwha_cli.kernels.gaps import UNFILLED, encode_gaps
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.quant_matmul import suits
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.spectral_linear import basis_input, computing_dtype, spectral_linear
from qwha_cli.kernels.weight_fp8 import Fp8Weight, both_forms
from qwha_cli.kernels.wht import wht


class SpectralLinear(AdaptedLinear):
    """A frozen nn.Linear or QuantizedLinear plus any number of named sparse adapters, of which the active ones add up.

    Args:
        base_layer: The layer to adapt; it is kept as it is, bias included.

    Raises:
        ModelError: The layer is neither an nn.Linear with a floating-point weight nor a QuantizedLinear.
    """

    adapter_layer_names = ("qwha_values",)
    other_param_names = ("qwha_gaps", "qwha_scale", "qwha_transform")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.qwha_values = Values()
        # persistent is not the default, and without it the places would silently be missing in the file
        self.qwha_gaps = BufferDict(persistent=True)
        self.qwha_scale: dict[str, float] = {}
        self.qwha_transform: dict[str, Transform] = {}
        self._index: Derived[tuple[Places, Tensor | None]] = Derived()

    # ---- adapters on the layer

    def holds(self, adapter_name: str) -> bool:
        """Whether the layer has an adapter of that name."""
        return adapter_name in self.qwha_values

    def update_layer(
        self,
        adapter_name: str,
        *,
        start: SparseRows | Sizes,
        scale: float,
        transform: Transform,
        inference_mode: bool = False,
        stored: torch.dtype = torch.float32,
    ) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: Name of the adapter.
            start: F (out, in) with its start values; or the sizes of tensors that a file will fill, without which they are of
                no use.
            scale: α.
            transform: "wht" or "identity".
            inference_mode: Whether its values stay frozen.
            stored: Number format of the values in the file that is to fill them; frozen ones are held in it.
        """
        self.qwha_scale[adapter_name] = scale
        self.qwha_transform[adapter_name] = transform
        if isinstance(start, Sizes):
            # what a file leaves out shall not go unseen
            values = torch.zeros(start.entries, dtype=stored if inference_mode else torch.float32)
            self._put(adapter_name, values, torch.full((start.gap_bytes,), UNFILLED, dtype=torch.uint8))
        else:
            self.set_rows(adapter_name, start)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_rows(self, adapter_name: str, rows: SparseRows) -> None:
        """Put another F in an adapter's place; values become float32 on the device of the base.

        Args:
            adapter_name: Name of the adapter.
            rows: F (out, in); the number of entries may change.

        Raises:
            ArtifactError: The shape is not the layer's.
            KernelError: Columns do not ascend within a row.
        """
        if tuple(rows.shape) != (self.out_features, self.in_features):
            raise ArtifactError(f"entries for a layer {tuple(rows.shape)} on one of {(self.out_features, self.in_features)}")
        self._put(adapter_name, rows.values.detach().float(), encode_gaps(rows.flat_index(), size=self._size))

    def _put(self, adapter_name: str, values: Tensor, gaps: Tensor) -> None:
        trainable = self.qwha_values[adapter_name].requires_grad if adapter_name in self.qwha_values else True
        device = device_of(self.base_layer)
        # clone: training must not write into the caller's tensor
        self.qwha_values[adapter_name] = nn.Parameter(values.to(device).clone(), requires_grad=trainable)
        self.qwha_gaps[adapter_name] = gaps.cpu()
        self._forget()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in peft; values that become trainable become float32."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        widen_trained(self.qwha_values)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As in peft; values that become trainable become float32."""
        super().set_requires_grad(adapter_names, requires_grad)
        widen_trained(self.qwha_values)

    def freeze(self, adapter_name: str) -> None:
        """Let an adapter's values stay as they are, in bfloat16 if that holds them exactly: as they are loaded for generation."""
        self.qwha_values[adapter_name] = frozen(self.qwha_values[adapter_name])
        self._weights.clear()

    @property
    def _size(self) -> int:
        return self.out_features * self.in_features

    def rows(self, adapter_name: str) -> SparseRows:
        """F of one adapter as a value, without α, detached, float32.

        Raises:
            ArtifactError: The stream of its places is damaged, or was never loaded.
        """
        return self._places((adapter_name,))[0].with_values(self.qwha_values[adapter_name].detach().float())

    def _places(self, names: tuple[str, ...]) -> tuple[Places, Tensor | None]:
        """Where the entries of adapters lie, each place once, and for several adapters which of them each entry is."""
        sources = [cast(Tensor, self.qwha_gaps[name]) for name in names]
        return self._index.get(names, sources, lambda: self._make_places(names))

    def _make_places(self, names: tuple[str, ...]) -> tuple[Places, Tensor | None]:
        shape, device = (self.out_features, self.in_features), device_of(self.base_layer)
        streams = {name: (cast(Tensor, self.qwha_gaps[name]), len(self.qwha_values[name])) for name in names}
        parts = [read_places(*stream, shape=shape, device=device, name=name) for name, stream in streams.items()]
        return (parts[0], None) if len(parts) == 1 else Places.union(parts)

    def _combined(self, names: tuple[str, ...]) -> tuple[Tensor, Places, float]:
        """Adapters as one F: its values, its places and the factor on it."""
        places, entry = self._places(names)
        if entry is None:
            return self.qwha_values[names[0]], places, self.qwha_scale[names[0]]
        scaled = torch.cat([self.qwha_values[name].float() * self.qwha_scale[name] for name in names])
        # entries at the same place add up, so that kernels see no place twice
        return scaled.new_zeros(len(places)).index_add(0, entry, scaled), places, 1.0

    # ---- forward

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The base's output with the active adapters added.

        Args:
            x: (..., in), any float dtype; under autocast the computation runs in the autocast dtype.
            *args: Handed to the base layer where it is called.
            **kwargs: Likewise.

        Returns:
            (..., out).
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._in_use()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        transform = self.qwha_transform[names[0]]
        mixed = any(self.qwha_transform[name] != transform for name in names)
        if mixed or (transform == "identity" and self.basis == "hadamard"):
            # no single form: the base in one basis, an adapter in another
            return self.base_layer(x, *args, **kwargs) + F.linear(x, self._delta(names).to(x.dtype))
        dtype = computing_dtype(x)
        if self._finds_weight(names):
            return self._forward_cached(x, names, transform, dtype)
        base = self._base(dtype)
        if isinstance(base, Codes) and suits(x, base, dtype, self.backend):
            how = {"basis": self.basis, "transform": transform, "bias": self.bias, "dtype": dtype, "backend": self.backend}
            return few_tokens(x, base, *self._combined(names), **how)  # pyright: ignore[reportArgumentType]
        values, places, scale = self._combined(names)
        kept = self.keep == "speed"
        kept_fp8 = kept and self.fp8 and suits_fp8(x, places.shape, dtype)
        return spectral_linear(
            x,
            values,
            base=base,
            places=places,
            basis=self.basis,
            scale=scale,
            bias=self.bias,
            transform=transform,
            backend=self.backend,
            # with 8-bit products none is kept dense
            weight=cast(Tensor, self._kept(names, transform, dtype)) if kept and not self.fp8 else None,
            until_backward=self.keep == "block",
            fp8=cast(Fp8Weight, self._kept(names, transform, E4M3)) if kept_fp8 else self.fp8,
        )

    def reads_transform(self) -> bool:
        """Whether `forward` reads nothing of its input but its shared transform, as things are now, by kernels of any kind."""
        names = () if self.merged or self.backend == "torch" else self._in_use()
        return bool(names) and self.basis == "hadamard" and all(self.qwha_transform[name] == "wht" for name in names)

    def reads_fp8(self, x: Tensor) -> bool:
        """Whether `forward`, of as many tokens as x (..., in) has, reads nothing but the 8-bit form of their shared transform."""
        dtype = computing_dtype(x)
        if not (self.fp8 and self.reads_transform() and suits_fp8(x, (self.out_features, self.in_features), dtype)):
            return False
        # the base is not asked for in training, where a split one may not be here yet
        few = not torch.is_grad_enabled() and suits(x, self._base(dtype), dtype, self.backend)
        return not (few or self._finds_weight(self._in_use()))

    def _finds_weight(self, names: tuple[str, ...]) -> bool:
        """Whether `forward` takes the dense weight that `cache_weights` keeps."""
        wanted = torch.is_grad_enabled() and any(self.qwha_values[name].requires_grad for name in names)
        return self._caching and not self.training and not wanted

    def _kept(self, names: tuple[str, ...], transform: Transform, dtype: torch.dtype) -> Tensor | Fp8Weight:
        """The weight, dense or in 8 bits, made once for all forward and backward passes until an optimizer moves the values."""
        sources = [self.qwha_values[name] for name in names]
        # in training a recorded pass reads it where it was
        find = self._weights.renew if self.keep == "speed" else self._weights.get
        return find((dtype, names), sources, lambda: self._made(names, transform, dtype))

    def _made(self, names: tuple[str, ...], transform: Transform, dtype: torch.dtype) -> Tensor | Fp8Weight:
        if dtype != E4M3:
            return self._effective(names, transform, dtype)
        values, places, scale = self._combined(names)
        return both_forms(self._base(torch.bfloat16), values, places, scale=scale, backend=self.backend)

    def renew_kept(self) -> None:
        """Compute the weights that keep="speed" has kept again, where they lie, if values have changed since."""
        # asked of every layer before every step
        names = self._in_use() if self.keep == "speed" else ()
        if not names:
            return
        transform, sources = self.qwha_transform[names[0]], [self.qwha_values[name] for name in names]
        for key in self._weights:
            dtype, kept = cast("tuple[torch.dtype, tuple[str, ...]]", key)
            if kept == names:
                self._weights.renew(key, sources, partial(self._made, names, transform, dtype))

    def _forward_cached(self, x: Tensor, names: tuple[str, ...], transform: Transform, dtype: torch.dtype) -> Tensor:
        # the same steps as in spectral_linear, so that the result is the same to the bit
        with torch.autocast(x.device.type, enabled=False):
            weight = cast(Tensor, self._kept(names, transform, dtype))
            bias = cast("Tensor | None", self.bias)
            z = basis_input(x, dtype, basis=self.basis, backend=self.backend)
            return F.linear(z, weight, None if bias is None else bias.to(dtype))

    def _effective(self, names: tuple[str, ...], transform: Transform, dtype: torch.dtype) -> Tensor:
        values, places, scale = self._combined(names)
        return effective_weight(
            self._base(dtype),
            values,
            places,
            basis=self.basis,
            scale=scale,
            dtype=dtype,
            transform=transform,
            backend=self.backend,
        )

    # ---- merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What one adapter adds to the weight: α F Hᵀ ("identity": α F).

        Args:
            adapter: Name of the adapter.

        Returns:
            float32 (out, in) in the weight basis, whatever basis the codes are in; differentiable in the values.
        """
        values = self.qwha_values[adapter].float() * self.qwha_scale[adapter]
        sparse = self._places((adapter,))[0].with_values(values).dense()
        return wht(sparse, transpose=True) if self.qwha_transform[adapter] == "wht" else sparse

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype, *, adapter_names: list[str] | None = None) -> Tensor:
        """The weight with adapters added: Q̂ + α F Hᵀ, or (Q̂ + α F) Hᵀ, computed in float32.

        Args:
            dtype: Of the result.
            adapter_names: Which adapters; by default the active ones.

        Returns:
            (out, in) in the weight basis.
        """
        names = tuple(self._in_use() if adapter_names is None else adapter_names)
        spectral = tuple(name for name in names if self.qwha_transform[name] == "wht")
        if self.basis == "hadamard":
            weight = self._effective(spectral, "wht", torch.float32) if spectral else self._base_weight(torch.float32)
            weight = wht(weight, transpose=True)
            names = tuple(name for name in names if name not in spectral)
        else:
            weight = self._base_weight(torch.float32)
        return (weight + self._delta(names) if names else weight).to(dtype, copy=True)

    # ---- housekeeping

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Like peft's, but without its cast to the base's dtype: on a bfloat16 base that would round float32 values on reload."""
        if self.qwha_values[adapter_name].device.type == "meta":
            return
        self.qwha_values[adapter_name] = moved(self.qwha_values[adapter_name], device or device_of(self.base_layer))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralLinear:
        """As nn.Module._apply, but the streams of places stay where they are."""
        gaps = {name: cast(Tensor, tensor) for name, tensor in self.qwha_gaps.items()}
        super()._apply(fn, recurse)
        for name, tensor in gaps.items():
            if tensor.device.type != "meta":
                self.qwha_gaps[name] = tensor
        return self

    def _forget(self) -> None:
        self._index.clear()
        super()._forget()

    def extra_repr(self) -> str:
        """Shape and entries of every adapter."""
        entries = ", ".join(f"{name}={len(values)}" for name, values in self.qwha_values.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, entries: {entries}"
