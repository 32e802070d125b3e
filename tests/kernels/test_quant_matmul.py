"""Codes and sparse entries times a few tokens: torch equal to a dense float64 matrix, Triton as close to it as torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Choice
from qwha_cli.kernels.codes import Codes
from qwha_cli.kernels.dequantize import dequantize
from qwha_cli.kernels.places import Places
from qwha_cli.kernels.quant_matmul import quant_matmul, suits
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.unpack import pack
from support.triton import HAS_TRITON, run_interpreted

# layout, bits, zero bits
FORMATS = [("gptq", 2, 2), ("gptq", 2, 4), ("gptq", 3, 3), ("gptq", 3, 4), ("gptq", 4, 4), ("gptq", 8, 8), ("nf4", 4, 4)]
# (out, in, group): less than a unit and than a tile, a part of a word's codes a group, several tiles, rows that share nf4 blocks
SIZES = [(33, 48, 16), (80, 80, 16), (80, 96, 48), (70, 1280, 64), (5, 22, 22), (24, 36, 12)]
TOKENS = (1, 3, 16)


def codes(layout: str, bits: int, zero_bits: int, shape: tuple[int, int, int], seed: int = 0) -> tuple[Codes, Tensor]:
    """Random codes and, computed from them before they are packed, the float64 matrix that they stand for."""
    out, size, group = shape
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 1 << bits, (out, size), generator=generator, dtype=torch.uint8)
    if layout == "nf4":
        table = torch.randn(16, generator=generator).sort().values
        scales = torch.rand(-(-out * size // group), generator=generator) + 0.5
        flat = torch.nn.functional.pad(numbers.reshape(-1), (0, out * size % 2))
        packed = ((flat[::2] << 4) | flat[1::2]).reshape(-1, 1)
        # a product in float32, as bitsandbytes computes it
        exact = (table[numbers.int()] * scales.repeat_interleave(group)[: out * size].view(out, size)).double()
        return Codes(packed, scales, table, "nf4", (out, size), bits, zero_bits, group), exact
    scales = (torch.rand(out, size // group, generator=generator) + 0.5).half()
    stored = torch.randint(0, 1 << zero_bits, (out, size // group), generator=generator, dtype=torch.uint8)
    zeros = stored.double() / (1 << (zero_bits - bits))
    exact = (numbers.double().view(out, -1, group) - zeros[:, :, None]) * scales.double()[:, :, None]
    words = pack(numbers, bits=bits).T.contiguous(), pack(stored.T.contiguous(), bits=zero_bits)
    packed = Codes(words[0], scales.T.contiguous(), words[1], "gptq", (out, size), bits, zero_bits, group)
    return packed, exact.view(out, size)


def sparse(shape: tuple[int, int, int], seed: int = 1) -> tuple[Places, Tensor, Tensor]:
    """Rows with none, few, and all of their places taken: the places, the values, and the float64 matrix."""
    out, size, _ = shape
    generator = torch.Generator().manual_seed(seed)
    share = torch.tensor([0.0, 0.05, 0.3, 1.0]).repeat(-(-out // 4))[:out]
    mask = torch.rand(out, size, generator=generator) < share[:, None]
    rows = SparseRows.from_mask(torch.randn(out, size, generator=generator), mask)
    return Places.from_rows(rows), rows.values, rows.dense(torch.float64)


def moved(base: Codes, device: str) -> Codes:
    tensors = (tensor.to(device) for tensor in (base.codes, base.scales, base.zeros))
    return Codes(*tensors, base.layout, base.shape, base.bits, base.zero_bits, base.group_size)


def as_reference(
    form: tuple[str, int, int], shape: tuple[int, int, int], dtype: torch.dtype, device: str, numbers: tuple[int, ...] = TOKENS
) -> int:
    """Compare Triton with the float64 product and with torch's error in the same dtype; how many comparisons were made."""
    base, exact = codes(*form, shape)
    places, values, spectrum = sparse(shape)
    base, values = moved(base, device), values.to(device)
    places = Places(places.row_starts.to(device), places.columns.to(device), places.shape)
    bias = torch.randn(shape[0])
    made = 0
    for tokens in numbers:
        z, u = torch.randn(2, tokens, shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
        own = {"bias": bias.to(device, dtype), "places": places, "values": values, "scale": 0.5}
        plain = z.double() @ exact.T
        both = plain + bias.to(dtype).double()
        cases: list[tuple[dict[str, object], Tensor]] = [
            ({}, plain),
            (own, both + 0.5 * z.double() @ spectrum.T),
            (own | {"sparse_input": u.to(device)}, both + 0.5 * u.double() @ spectrum.T),
        ]
        for options, wanted in cases:
            found = quant_matmul(z.to(device), base, **options, backend="triton")
            assert found.dtype == dtype
            assert found.shape == wanted.shape
            if device != "cpu":
                assert torch.equal(found, quant_matmul(z.to(device), base, **options, backend="triton"))
            torch_error = (quant_matmul(z.to(device), base, **options, backend="torch").cpu().double() - wanted).abs().max()
            # sums in another order, and the rounding of the largest result, which torch may be spared by luck
            floor = (1e-6 + torch.finfo(dtype).eps / 2) * wanted.abs().max()
            assert (found.cpu().double() - wanted).abs().max() <= 2 * torch_error + floor
            made += 1
    return made


def half_values(device: str, dtype: torch.dtype, backend: str) -> int:
    """Values in bfloat16 give the bits that the same numbers give in float32; how many comparisons were made."""
    made = 0
    for form in FORMATS[:2]:
        base, _ = codes(*form, SIZES[0])
        places, values, _ = sparse(SIZES[0])
        places, half = Places(places.row_starts.to(device), places.columns.to(device), places.shape), values.bfloat16().to(device)
        for tokens in (1, 3):
            z = torch.randn(tokens, SIZES[0][1], generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
            how = {"places": places, "scale": 0.3, "backend": backend}
            found = quant_matmul(z, moved(base, device), values=half, **how)
            assert torch.equal(found, quant_matmul(z, moved(base, device), values=half.float(), **how))
            made += 1
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_in_bfloat16_give_the_bits_of_float32_ones(dtype: torch.dtype) -> None:
    assert half_values("cpu", dtype, "torch") == 4


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("form", FORMATS)
def test_torch_is_the_dense_reference(form: tuple[str, int, int], shape: tuple[int, int, int]) -> None:
    base, exact = codes(*form, shape)
    places, values, spectrum = sparse(shape)
    assert torch.allclose(dequantize(base, torch.float64), exact, atol=1e-14)
    assert torch.equal(dequantize(base, torch.bfloat16), exact.float().bfloat16())
    z, u = torch.randn(2, 3, shape[1], dtype=torch.float64)
    options = {"places": places, "values": values.double(), "scale": 0.5}
    assert torch.allclose(quant_matmul(z, base), z @ exact.T, atol=1e-11)
    assert torch.allclose(quant_matmul(z, base, **options), z @ (exact + 0.5 * spectrum).T, atol=1e-11)
    assert torch.allclose(quant_matmul(z, base, **options, sparse_input=u), z @ exact.T + 0.5 * u @ spectrum.T, atol=1e-11)


def test_a_row_of_nf4_need_not_end_with_a_byte() -> None:
    base, exact = codes("nf4", 4, 4, (7, 15, 5))
    z = torch.randn(2, 15, dtype=torch.float64)
    assert torch.allclose(quant_matmul(z, base), z @ exact.T, atol=1e-12)
    with pytest.raises(KernelError, match="15 inputs in blocks of 5"):
        quant_matmul(z.float(), base, backend="triton")


def test_what_does_not_fit_is_refused() -> None:
    base, _ = codes("gptq", 2, 2, (33, 48, 16))
    places, values, _ = sparse((33, 48, 16))
    z = torch.randn(2, 48)
    cases = [
        ("1 to 16 tokens x 48", (torch.randn(17, 48), base), {}),
        ("1 to 16 tokens x 48", (torch.randn(2, 47), base), {}),
        ("inputs of F", (z, base), {"sparse_input": z.double(), "places": places, "values": values}),
        ("go together", (z, base), {"values": values}),
        ("places of", (z, base), {"places": places, "values": values[:-1]}),
        ("a bias of 33", (z, base), {"bias": torch.zeros(32)}),
        ("no gradients", (z, base), {"places": places, "values": values.clone().requires_grad_()}),
        ("inputs of torch.float64", (z.double(), base), {"backend": "triton"}),
    ]
    for message, arguments, options in cases:
        with pytest.raises(KernelError, match=message):
            quant_matmul(*arguments, **options)
    with torch.no_grad():
        quant_matmul(z, base, places=places, values=values.requires_grad_())


def every_cut(device: str, forms: list[tuple[str, int, int]], shape: tuple[int, int, int]) -> int:
    """However the work is cut, the result is the same to rounding; how many cuts were tried."""
    from qwha_cli.kernels.quant_matmul_cut import Config
    from qwha_cli.kernels.quant_matmul_triton import quant_matmul

    places, values, spectrum = sparse(shape)
    places = Places(places.row_starts.to(device), places.columns.to(device), places.shape)
    cuts = [Config(32, 16, 1, 0, 16, 4), Config(16, 32, 1, 3, 16, 4), Config(64, 16, 3, 0, 8, 4), Config(16, 16, 9, 2, 4, 1)]
    for form in forms:
        base, exact = codes(*form, shape)
        for tokens in (1, 2):
            z = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(0)).to(device)
            wanted = z.cpu().double() @ (exact + 0.5 * spectrum).T
            for cut in cuts:
                moved_values = (places, values.to(device))
                found = quant_matmul(z, z, moved(base, device), moved_values, scale=0.5, bias=None, config=cut)
                assert (found.cpu().double() - wanted).abs().max() <= 2e-6 * wanted.abs().max(), cut
    return len(forms) * len(cuts)


_INTERPRETED = """
import torch
from kernels.test_quant_matmul import FORMATS, SIZES, as_reference, every_cut, half_values
assert half_values("cpu", torch.float32, "triton") == 4
made = sum(as_reference(form, SIZES[0], torch.float32, "cpu", (1, 3)) for form in FORMATS)
# the interpreter has no bfloat16 of its own: it multiplies the bits
made += sum(as_reference(form, shape, torch.float16, "cpu", (1, 16)) for form, shape in zip(FORMATS[1::2], SIZES[1:]))
made += sum(as_reference(FORMATS[-1], shape, torch.float16, "cpu", (2,)) for shape in SIZES[-2:])
print("interpreted", made, every_cut("cpu", FORMATS[1::2], (40, 320, 64)))
"""


@pytest.mark.parametrize(("layout", "bits", "most"), [("gptq", 2, 16), ("gptq", 4, 16), ("nf4", 4, 1)])
def test_it_is_taken_for_as_many_tokens_as_it_is_faster_for(
    monkeypatch: pytest.MonkeyPatch, layout: str, bits: int, most: int
) -> None:
    monkeypatch.setattr("qwha_cli.kernels.quant_matmul.choose", lambda *_, **__: Choice("triton", "for this test"))
    base, _ = codes(layout, bits, bits, (80, 80, 16))

    def taken(*shape: int) -> bool:
        return suits(torch.zeros(*shape, 80, dtype=torch.float16), base, torch.float16, "auto")

    with torch.no_grad():
        assert [taken(1, count) for count in (1, most, most + 1)] == [True, True, False]
        assert not taken(0, 1)
    assert not taken(1, 1)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_interpreted_is_the_dense_reference() -> None:
    assert run_interpreted(_INTERPRETED) == "interpreted 66 12"


# the interpreter has seen all sizes; on a card every size, dtype and number of tokens is compiled anew, seconds each
ON_A_CARD = [(form, torch.bfloat16) for form in FORMATS]
ON_A_CARD += [(FORMATS[i], dtype) for i in (1, 2, 6) for dtype in (torch.float16, torch.float32)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("form", "dtype"), ON_A_CARD)
def test_triton_on_a_gpu_is_the_dense_reference(form: tuple[str, int, int], dtype: torch.dtype) -> None:
    as_reference(form, SIZES[0], dtype, "cuda", (3,))
    as_reference(form, (1000, 3072, 64), dtype, "cuda", (1, 16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_in_bfloat16_give_the_same_bits_on_a_gpu(dtype: torch.dtype) -> None:
    half_values("cuda", dtype, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_cut_on_a_gpu_gives_the_same() -> None:
    assert every_cut("cuda", FORMATS[1::2], (70, 1280, 64)) == 4 * len(FORMATS[1::2])
