"""A quantized weight as one typed value: its tensors, its format, its shape; and the options that a quantizer is given.

The basis says what the codes stand for: "weight" W itself, "hadamard" W H. A value dequantizes into its own basis;
`in_weight_basis` undoes the transform. How the tensors are laid out is in layout.py, how they are chosen in quantizers/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from qwha_cli.errors import ArtifactError, KernelError, ModelError
from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize
from qwha_cli.kernels.unpack import WIDTHS
from qwha_cli.kernels.wht import wht
from qwha_cli.quant.layout import NAMES, Layout, Shapes, pack_gptq, tensor_shapes, unpack_gptq

Basis = Literal["weight", "hadamard"]
Method = Literal["gptq", "rtn", "nf4"]
GridSearch = Literal["minmax", "search"]
Zeros = Literal["integer", "fine"]
# a fine zero point takes as many bits as the codes, and at least so many
_FINE_ZERO_BITS = 4


@dataclass(frozen=True)
class QuantFormat:
    """How a weight is stored: everything needed to read the codes back, and the method that chose them.

    Args:
        method: The quantizer.
        bits: Bits a code: 2, 3, 4 or 8; nf4 has 4.
        group_size: Consecutive inputs of a row that share scale and zero.
        symmetric: Whether the zero point is fixed in the middle; recorded only, the stored zeros rule.
        basis: What the codes stand for.
        zero_bits: Bits of a stored zero point; those above `bits` stand behind the point.
    """

    method: Method
    bits: int
    group_size: int
    symmetric: bool
    basis: Basis
    zero_bits: int = field(kw_only=True)

    @property
    def layout(self) -> Layout:
        """Which tensors hold the codes."""
        return "nf4" if self.method == "nf4" else "gptq"

    def shapes(self, shape: tuple[int, int]) -> Shapes:
        """Name, shape and dtype of every tensor that an (out, in) matrix has in this format."""
        return tensor_shapes(self.layout, shape=shape, bits=self.bits, zero_bits=self.zero_bits, group_size=self.group_size)

    def to_dict(self) -> dict[str, str | int | bool]:
        """JSON-able fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> QuantFormat:
        """Undo `to_dict`.

        Raises:
            ArtifactError: A field is missing or has a value that this version cannot read.
        """
        names = ("method", "bits", "group_size", "symmetric", "basis", "zero_bits")
        method, bits, group_size, symmetric, basis, zero_bits = (fields.get(name) for name in names)
        widths = (4,) if method == "nf4" else WIDTHS
        zero_bits = bits if zero_bits is None else zero_bits  # folders from before zero points could be fine
        if (
            method not in get_args(Method)
            or basis not in get_args(Basis)
            or not (isinstance(bits, int) and bits in widths)
            or not (isinstance(group_size, int) and group_size > 0)
            or not isinstance(symmetric, bool)
            or not (isinstance(zero_bits, int) and zero_bits in WIDTHS and zero_bits >= bits)
        ):
            raise ArtifactError(
                f"unknown quantization format: method {method!r}, bits {bits!r}, group_size {group_size!r}, "
                f"symmetric {symmetric!r}, basis {basis!r}, zero_bits {zero_bits!r}",
                remedy="quantize the model again with `qwha quantize`, or read it with the version of qwha that wrote it",
            )
        return cls(cast(Method, method), bits, group_size, symmetric, cast(Basis, basis), zero_bits=zero_bits)


@dataclass(frozen=True)
class QuantizerOptions:
    """What a quantizer is asked to do.

    Args:
        method: The quantizer's name in the catalogue, recorded in the result's format.
        bits: Bits a code.
        group_size: Consecutive inputs of a row that share scale and zero; divides the inputs.
        symmetric: Whether the zero point is fixed in the middle of the grid.
        basis: Recorded in the format; the weight given is already in it.
        grid: Scales and zeros from the extremes, or by search. Not for nf4.
        zeros: Zero points are integers, or multiples of 2^(bits − 4), four bits each. Not for nf4.
        damping: GPTQ: added to the Gram matrix's diagonal, as a fraction of its mean.
        magr: GPTQ: strength of MagR's smoothing of outliers; None for none.
        sweeps: GPTQ: sweeps of coordinate descent over codes and grid afterwards; 0 for none.
        block: GPTQ: columns between two updates of all later columns. Affects speed, and results by rounding only.
        backend: GPTQ: which implementation runs inside a block. Affects speed, and results by rounding only.
    """

    method: Method
    bits: int
    group_size: int
    symmetric: bool = False
    basis: Basis = "weight"
    grid: GridSearch = "search"
    damping: float = 0.01
    magr: float | None = None
    sweeps: int = 0
    zeros: Zeros = "integer"
    block: int = 128
    backend: Requested = "auto"

    @property
    def zero_bits(self) -> int:
        """Bits of a stored zero point."""
        return max(self.bits, _FINE_ZERO_BITS) if self.zeros == "fine" and not self.symmetric else self.bits

    @property
    def format(self) -> QuantFormat:
        """The storage format of what the quantizer makes."""
        return QuantFormat(
            method=self.method,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            basis=self.basis,
            zero_bits=self.zero_bits,
        )


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized (out, in) matrix.

    Args:
        tensors: The layout's tensors by name; all on one device.
        format: How to read them.
        shape: (out, in).
    """

    tensors: dict[str, Tensor]
    format: QuantFormat
    shape: tuple[int, int]

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, zeros: Tensor, *, format: QuantFormat) -> PackedWeight:
        """Pack integer codes: value = scale · (code − zero).

        Args:
            codes: uint8 (out, in), each < 2^bits.
            scales: float16 (out, in / group_size).
            zeros: float32 (out, in / group_size), multiples of 2^(bits − zero_bits), each < 2^bits.
            format: Of the integer kind, not nf4.

        Raises:
            KernelError: A code or zero does not fit into the format's bits.
        """
        shape = (codes.shape[0], codes.shape[1])
        return cls(pack_gptq(codes, scales, zeros, bits=format.bits, zero_bits=format.zero_bits), format, shape)

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `from_codes` was given: codes uint8 (out, in), scales float16 and zeros float32 (out, in / group_size).

        Raises:
            KernelError: nf4 has no such codes.
        """
        if self.format.layout == "nf4":
            raise KernelError("an nf4 weight has no scale · (code − zero)", remedy="quantize with gptq or rtn")
        return unpack_gptq(self.tensors, shape=self.shape, bits=self.format.bits, zero_bits=self.format.zero_bits)

    def as_codes(self) -> Codes:
        """The matrix as kernels read it; it shares the tensors."""
        form = self.format
        codes, scales, zeros = (self.tensors[name] for name in NAMES[form.layout])
        return Codes(codes, scales, zeros, form.layout, self.shape, form.bits, form.zero_bits, form.group_size)

    def dequantize(self, dtype: torch.dtype, *, backend: Requested = "auto") -> Tensor:
        """The matrix (out, in) in its own basis, rounded once to `dtype`; the same to the bit from every backend."""
        return dequantize(self.as_codes(), dtype, backend=backend)

    def in_weight_basis(self, dtype: torch.dtype) -> Tensor:
        """Q̂, or Q̂ Hᵀ if the codes live in the Hadamard basis: what multiplies the untransformed input; (out, in)."""
        if self.format.basis == "weight":
            return self.dequantize(dtype)
        # transformed before rounding, so that half precision rounds once
        exact = torch.promote_types(dtype, torch.float32)
        return wht(self.dequantize(exact), transpose=True).to(dtype)

    def bits_per_weight(self) -> float:
        """Stored bits of all tensors, scales and zeros included, over the number of weights."""
        stored = sum(t.numel() * t.element_size() for t in self.tensors.values())
        return 8 * stored / (self.shape[0] * self.shape[1])

    def digest(self) -> str:
        """SHA-256 of format, shape and every tensor's bytes: equal digests, equal weights."""
        found = hashlib.sha256(repr((self.format, self.shape)).encode())
        for part in _tensor_bytes(self.tensors):
            found.update(part)
        return found.hexdigest()


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Name, dtype, shape and contents of tensors in the order of their names, to be hashed."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        yield tensor.view(-1).view(torch.uint8).numpy().tobytes()


def check_group(name: str, in_features: int, group_size: int) -> None:
    """Refuse a layer whose inputs are no whole number of groups.

    Args:
        name: The layer, for the message.
        in_features: Its inputs.
        group_size: Inputs a group.

    Raises:
        ModelError: `in_features` is no multiple of `group_size`.
    """
    if group_size < 1 or in_features % group_size:
        raise ModelError(
            f"in_features {in_features} is no multiple of group_size {group_size}",
            where=f"layer {name}",
            remedy=f"set quantize.group_size to a divisor of {in_features}, or keep the layer in 16 bits with quantize.exclude",
        )
