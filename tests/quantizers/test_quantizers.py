"""What every quantizer must do, and what each claims for itself."""

from __future__ import annotations

import time

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qwha_cli import catalog
from qwha_cli.errors import ModelError, NumericsError
from qwha_cli.kernels.wht import transform_gram, wht
from qwha_cli.quant.error import layer_error, sqnr_db
from qwha_cli.quant.gram import Gram
from qwha_cli.quant.packed import PackedWeight
from support.quantized import correlated_inputs, gaussian, options, run_quantizer

# the least SQNR in dB on Gaussian weights in groups of 64; a uniform quantizer can reach 9.25, 14.27, 20.22 (Max 1960), and one
# fitted to each group a little more
FLOORS = [
    ("rtn", 2, "minmax", 6.3),
    ("rtn", 2, "search", 8.8),
    ("rtn", 3, "minmax", 13.8),
    ("rtn", 3, "search", 14.7),
    ("rtn", 4, "minmax", 20.3),
    ("rtn", 4, "search", 20.8),
    ("rtn", 8, "minmax", 44.5),
    ("nf4", 4, "search", 20.4),
]


def gram_of(features: int, *, count: int = 512, seed: int = 0) -> Tensor:
    inputs = correlated_inputs(count, features, seed=seed)
    return inputs.T @ inputs


def error(weight: Tensor, packed: PackedWeight, gram: Tensor | None) -> float:
    return layer_error(weight, packed.dequantize(torch.float32), gram)


def same(one: PackedWeight, other: PackedWeight) -> bool:
    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize(("method", "bits", "grid", "floor"), FLOORS)
def test_gaussian_weights_keep_a_floor_of_signal_to_noise(method: str, bits: int, grid: str, floor: float) -> None:
    weight = gaussian(256, 512)
    packed = run_quantizer(weight, None, options(method, bits, 64, grid=grid))
    assert sqnr_db(weight, packed.dequantize(torch.float32)) >= floor


@pytest.mark.parametrize("method", sorted(catalog.QUANTIZERS))
def test_the_same_input_gives_the_same_bits_and_is_not_written_into(method: str) -> None:
    weight, gram = gaussian(48, 96), gram_of(96)
    kept = weight.clone(), gram.clone()
    wanted = options(method, 4, 32, magr=1e-3 if method == "gptq" else None)
    one, other = (run_quantizer(weight, gram, wanted) for _ in range(2))
    assert one.digest() == other.digest()
    assert torch.equal(weight, kept[0])
    assert torch.equal(gram, kept[1])
    strided = run_quantizer(weight.T.contiguous().T, gram, wanted)
    assert same(strided, one)


@pytest.mark.parametrize("method", sorted(catalog.QUANTIZERS))
@pytest.mark.parametrize("basis", ["weight", "hadamard"])
def test_the_result_says_what_was_asked_for(method: str, basis: str) -> None:
    wanted = options(method, 4, 32, basis)
    packed = run_quantizer(gaussian(48, 96), gram_of(96), wanted)
    assert packed.format == wanted.format
    assert packed.shape == (48, 96)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == wanted.format.shapes((48, 96))


@pytest.mark.parametrize("method", sorted(catalog.QUANTIZERS))
def test_a_layer_that_cannot_be_done_is_refused_by_its_name(method: str) -> None:
    broken = gaussian(8, 96)
    broken[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"layer some\.layer: .*not finite"):
        run_quantizer(broken, gram_of(96), options(method, 4, 32), "some.layer")
    with pytest.raises(ModelError, match=r"layer some\.layer: in_features 80 is no multiple"):
        run_quantizer(gaussian(8, 80), None, options(method, 4, 64), "some.layer")


# ---- GPTQ


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", ["minmax", "search"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_without_correlations_is_rtn_to_the_last_bit(bits: int, grid: str, symmetric: bool) -> None:
    weight = gaussian(80, 192)
    rtn = run_quantizer(weight, None, options("rtn", bits, 16, grid=grid, symmetric=symmetric))
    wanted = options("gptq", bits, 16, grid=grid, symmetric=symmetric)
    for gram in (None, torch.eye(192), 7 * torch.eye(192), torch.zeros(192, 192)):
        assert same(run_quantizer(weight, gram, wanted), rtn)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (128, 192)])
def test_gptq_has_the_smaller_output_error_on_correlated_inputs(bits: int, shape: tuple[int, int]) -> None:
    weight, gram = gaussian(*shape), gram_of(shape[1])
    for grid in ("minmax", "search"):
        rtn = error(weight, run_quantizer(weight, gram, options("rtn", bits, 16, grid=grid)), gram)
        assert error(weight, run_quantizer(weight, gram, options("gptq", bits, 16, grid=grid)), gram) < 0.7 * rtn


def plain_gptq(weight: Tensor, gram: Tensor, packed: PackedWeight, damping: float) -> Tensor:
    """The algorithm word for word in float64: no blocks, the inverse updated column by column; on the grids of `packed`."""
    rest, group = weight.double(), packed.format.group_size
    inverse = torch.linalg.inv(
        gram.double() + damping * gram.double().diagonal().mean() * torch.eye(gram.shape[0], dtype=torch.float64)
    )
    scales = packed.tensors["scales"].double()
    zeros = zeros_of(packed)
    result = torch.empty_like(rest)
    for j in range(rest.shape[1]):
        scale, zero = scales[j // group], zeros[j // group]
        code = ((rest[:, j] / scale).round() + zero).clamp(0, 2**packed.format.bits - 1)
        result[:, j] = scale * (code - zero)
        rest = rest - torch.outer((rest[:, j] - result[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


def zeros_of(packed: PackedWeight) -> Tensor:
    """Zero points (groups, out): minus what code 0 stands for, over the scale."""
    tensors = {**packed.tensors, "qweight": torch.zeros_like(packed.tensors["qweight"])}
    lowest = PackedWeight(tensors, packed.format, packed.shape).dequantize(torch.float64)[:, :: packed.format.group_size].T
    return (-lowest / packed.tensors["scales"].double()).round()


@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_gptq_is_the_papers_algorithm_whatever_the_block(block: int) -> None:
    weight, gram = gaussian(40, 80), gram_of(80)
    packed = run_quantizer(weight, gram, options("gptq", 3, 16, block=block))
    found, expected = packed.dequantize(torch.float64), plain_gptq(weight, gram, packed, 0.01)
    # float32 rounding may tip a weight that lies between two values, after which its row goes another way of equal worth
    assert (found == expected).all(1).float().mean() > 0.9
    assert layer_error(weight, found, gram) == pytest.approx(layer_error(weight, expected, gram), rel=0.02)


def test_gptq_leaves_inputs_that_never_occur_to_plain_rounding() -> None:
    weight, inputs = gaussian(32, 96), correlated_inputs(512, 96)
    dead = [0, 17, 95]
    inputs[:, dead] = 0
    gram = inputs.T @ inputs
    packed = run_quantizer(weight, gram, options("gptq", 2, 16, grid="minmax"))
    rtn = run_quantizer(weight, None, options("rtn", 2, 16, grid="minmax"))
    assert torch.equal(packed.dequantize(torch.float32)[:, dead], rtn.dequantize(torch.float32)[:, dead])
    assert error(weight, packed, gram) < error(weight, rtn, gram)


def test_gptq_in_the_hadamard_basis_beats_the_weight_basis_on_outliers() -> None:
    weight, gram = gaussian(96, 96), gram_of(96)
    weight[:, ::7] *= 8  # heavy tails are what the transform spreads out
    plain = run_quantizer(weight, gram, options("gptq", 2, 16))
    turned = run_quantizer(wht(weight), transform_gram(gram), options("gptq", 2, 16, "hadamard"))
    in_weight = turned.in_weight_basis(torch.float32)
    assert layer_error(weight, in_weight, gram) < error(weight, plain, gram)
    assert layer_error(weight, in_weight, gram) == pytest.approx(error(wht(weight), turned, transform_gram(gram)), rel=1e-3)


def test_too_few_samples_are_carried_by_the_damping() -> None:
    weight, inputs = gaussian(32, 96), correlated_inputs(10, 96)
    gram = inputs.T @ inputs
    packed = run_quantizer(weight, gram, options("gptq", 3, 16))
    assert torch.isfinite(packed.dequantize(torch.float32)).all()
    assert error(weight, packed, gram) < error(weight, run_quantizer(weight, gram, options("rtn", 3, 16)), gram)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    gram = gram_of(80)
    factor = Gram(gram.double()).inverse_factor(0.01, name="x").double()
    assert torch.equal(factor, factor.triu())
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(80, dtype=torch.float64)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(80, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", ["indefinite", "nan"])
def test_a_gram_matrix_that_cannot_be_factorised_names_layer_damping_and_remedy(fault: str) -> None:
    gram = gram_of(48)
    if fault == "indefinite":
        gram -= 3 * gram.diagonal().mean() * torch.eye(48)
        gram.fill_diagonal_(float(gram.diagonal().abs().mean()))
        gram[0, 1] = gram[1, 0] = 1e6
    else:
        gram[3, 5] = gram[5, 3] = float("nan")
    with pytest.raises(NumericsError, match=r"layer some\.layer: .*48 inputs with damping 0\.01") as caught:
        run_quantizer(gaussian(8, 48), gram, options("gptq", 2, 16), "some.layer")
    assert "calibration.samples" in str(caught.value.remedy)


def test_a_layer_of_a_small_model_takes_about_a_second() -> None:
    weight, gram = gaussian(1536, 576), gram_of(576, count=1024)
    started = time.monotonic()
    run_quantizer(weight, gram, options("gptq", 2, 64))
    assert time.monotonic() - started < 10  # about 0.5 s on an idle core; generous, for machines that are not idle


# ---- NF4


@pytest.mark.parametrize("group_size", [32, 64])
def test_nf4_is_bitsandbytes_own(group_size: int) -> None:
    weight = gaussian(48, 192)
    packed = run_quantizer(weight, None, options("nf4", 4, group_size))
    codes, state = bnb.quantize_4bit(weight, blocksize=group_size, quant_type="nf4")
    assert torch.equal(packed.tensors["weight"], codes)
    assert torch.equal(packed.dequantize(torch.float32), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (4, 48)])
def test_nf4_refuses_what_bitsandbytes_does_not_have(bits: int, group_size: int) -> None:
    with pytest.raises(ModelError, match=f"not {bits} bits and {group_size}"):
        run_quantizer(gaussian(4, 192), None, options("nf4", bits, group_size))
