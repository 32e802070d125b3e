"""The two measures of a quantized layer's error."""

from __future__ import annotations

import math

import pytest
import torch

from qwha_cli.quant.error import layer_error, sqnr_db
from support.quantized import correlated_inputs, gaussian


def test_layer_error_is_the_share_of_the_outputs_energy() -> None:
    weight, approx, inputs = gaussian(20, 48), gaussian(20, 48, seed=1), correlated_inputs(100, 48)
    expected = ((inputs @ (weight - approx).T) ** 2).sum() / ((inputs @ weight.T) ** 2).sum()
    assert layer_error(weight, approx, inputs.T @ inputs) == pytest.approx(float(expected), rel=1e-4)


def test_without_a_gram_all_inputs_count_alike() -> None:
    weight, approx = gaussian(20, 48), gaussian(20, 48, seed=1)
    assert layer_error(weight, approx, None) == pytest.approx(layer_error(weight, approx, torch.eye(48)), rel=1e-6)


def test_the_ends_of_the_scale_are_exact() -> None:
    weight = gaussian(20, 48)
    zero = torch.zeros_like(weight)
    assert layer_error(weight, weight, None) == 0
    assert layer_error(weight, zero, None) == 1
    assert layer_error(zero, zero, None) == 0
    assert layer_error(zero, weight, None) == math.inf
    assert sqnr_db(weight, weight) == math.inf
    assert sqnr_db(weight, zero) == 0


def test_a_tenth_of_the_amplitude_is_twenty_decibels() -> None:
    weight = gaussian(20, 48)
    assert sqnr_db(weight, weight * 1.1) == pytest.approx(20, abs=1e-3)


def test_half_precision_approximations_are_measured_in_float32() -> None:
    weight = gaussian(64, 48)
    assert 40 < sqnr_db(weight, weight.bfloat16()) < 60
