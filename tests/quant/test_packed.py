"""PackedWeight: what goes in comes out, in the basis asked for, and all bits are counted."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import ArtifactError, KernelError, ModelError
from qwha_cli.kernels.hadamard import dense
from qwha_cli.quant.packed import PackedWeight, QuantFormat, check_group
from support.quantized import gaussian, options, run_quantizer

BITS = (2, 3, 4, 8)
# (out, in): no power of two, and 3-bit rows that do not end on a word
SIZES = ((80, 48), (48, 80), (5, 16), (96, 64))


def random_parts(shape: tuple[int, int], bits: int, group_size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(bits)
    groups = (shape[0], shape[1] // group_size)
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, groups, generator=generator, dtype=torch.uint8)
    return codes, (torch.rand(groups, generator=generator) * 0.1 + 0.001).half(), zeros


def formatted(bits: int, basis: str = "weight", zero_bits: int | None = None) -> QuantFormat:
    return QuantFormat("gptq", bits, 16, symmetric=False, basis=basis, zero_bits=zero_bits or bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SIZES)
def test_dequantized_is_scale_times_code_minus_zero_exactly(bits: int, shape: tuple[int, int]) -> None:
    codes, scales, zeros = random_parts(shape, bits)
    packed = PackedWeight.from_codes(codes, scales, zeros, format=formatted(bits))
    wide = lambda t: t.double().repeat_interleave(16, dim=1)  # noqa: E731
    expected = wide(scales) * (codes.double() - wide(zeros))
    for dtype in (torch.float64, torch.float32):  # float32 holds every such product exactly
        assert torch.equal(packed.dequantize(dtype).double(), expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(packed.dequantize(dtype), expected.to(dtype))


@pytest.mark.parametrize(("bits", "zero_bits"), [(2, 4), (2, 8), (3, 4), (4, 8)])
def test_fine_zero_points_come_back_exactly(bits: int, zero_bits: int) -> None:
    codes, scales, _ = random_parts((80, 48), bits)
    parts = 1 << (zero_bits - bits)
    zeros = torch.arange(80 * 3).view(80, 3).remainder(1 << zero_bits) / parts
    packed = PackedWeight.from_codes(codes, scales, zeros, format=formatted(bits, zero_bits=zero_bits))
    wide = lambda t: t.double().repeat_interleave(16, dim=1)  # noqa: E731
    expected = wide(scales) * (codes.double() - wide(zeros))
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(packed.dequantize(dtype).double(), expected)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == packed.format.shapes((80, 48))


def test_a_format_from_before_fine_zero_points_has_integer_ones() -> None:
    fields = formatted(2).to_dict()
    del fields["zero_bits"]
    assert QuantFormat.from_dict(fields) == formatted(2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SIZES)
def test_tensors_have_the_shapes_that_the_format_promises(bits: int, shape: tuple[int, int]) -> None:
    packed = PackedWeight.from_codes(*random_parts(shape, bits), format=formatted(bits))
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == packed.format.shapes(shape)


def test_the_weight_basis_is_reached_by_the_transposed_hadamard_matrix() -> None:
    parts = random_parts((80, 48), 3)
    packed = PackedWeight.from_codes(*parts, format=formatted(3, "hadamard"))
    expected = packed.dequantize(torch.float64) @ dense(48).T
    torch.testing.assert_close(packed.in_weight_basis(torch.float64), expected, rtol=0, atol=1e-12)
    plain = PackedWeight.from_codes(*parts, format=formatted(3))
    assert torch.equal(plain.in_weight_basis(torch.float32), plain.dequantize(torch.float32))


@pytest.mark.parametrize(("bits", "group_size", "expected"), [(2, 64, 2 + 18 / 64), (3, 32, 3 + 19 / 32), (4, 16, 4 + 20 / 16)])
def test_bits_per_weight_counts_scales_and_zeros(bits: int, group_size: int, expected: float) -> None:
    packed = run_quantizer(gaussian(128, 256), None, options("rtn", bits, group_size))
    assert packed.bits_per_weight() == pytest.approx(expected, rel=1e-12)


def test_bits_per_weight_of_nf4_counts_the_maxima_and_the_table() -> None:
    packed = run_quantizer(gaussian(128, 256), None, options("nf4", 4, 64))
    assert packed.bits_per_weight() == pytest.approx(4 + 32 / 64 + 16 * 32 / (128 * 256), rel=1e-12)


def test_the_digest_sees_every_tensor_the_format_and_the_shape() -> None:
    packed = PackedWeight.from_codes(*random_parts((80, 48), 2), format=formatted(2))
    found = {packed.digest()}
    assert len(packed.digest()) == len(hashlib.sha256().hexdigest())
    for name in packed.tensors:
        tensors = {n: t.clone() for n, t in packed.tensors.items()}
        tensors[name].view(-1)[3] += 1
        found.add(PackedWeight(tensors, packed.format, packed.shape).digest())
    found.add(PackedWeight(packed.tensors, formatted(2, "hadamard"), packed.shape).digest())
    assert len(found) == 5
    again = PackedWeight({n: t.clone() for n, t in reversed(packed.tensors.items())}, packed.format, packed.shape)
    assert again.digest() == packed.digest()


def test_a_code_too_large_for_the_format_is_refused() -> None:
    codes, scales, zeros = random_parts((16, 16), 4)
    with pytest.raises(KernelError, match="does not fit into 2 bits"):
        PackedWeight.from_codes(codes, scales, zeros.clamp(max=3), format=formatted(2))


def test_a_format_survives_its_dictionary() -> None:
    for wanted in (formatted(3, "hadamard"), QuantFormat("nf4", 4, 64, symmetric=False, basis="weight", zero_bits=4)):
        assert QuantFormat.from_dict(wanted.to_dict()) == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "awq"),
        ("bits", 5),
        ("bits", None),
        ("group_size", 0),
        ("group_size", "64"),
        ("symmetric", None),
        ("basis", "dct"),
        ("zero_bits", 1),
        ("zero_bits", "4"),
    ],
)
def test_a_format_that_this_version_cannot_read_is_refused(key: str, value: object) -> None:
    with pytest.raises(ArtifactError, match="unknown quantization format") as caught:
        QuantFormat.from_dict({**formatted(2).to_dict(), key: value})
    assert caught.value.remedy


def test_nf4_has_four_bits_only() -> None:
    with pytest.raises(ArtifactError, match="bits 3"):
        QuantFormat.from_dict({"method": "nf4", "bits": 3, "group_size": 64, "symmetric": False, "basis": "weight"})


def test_inputs_that_are_no_whole_number_of_groups_are_refused_by_the_layers_name() -> None:
    with pytest.raises(ModelError, match="80 is no multiple of group_size 64") as caught:
        check_group("model.layers.0.mlp.down_proj", 80, 64)
    assert "model.layers.0.mlp.down_proj" in str(caught.value)
    check_group("fine", 128, 64)
