"""MagR: shrink each group's largest weights before quantization, where the layer's output hardly notices.

    minimise over V   ½ tr((W − V) G (W − V)ᵀ) / λ + α Σ_groups ‖v‖_∞        λ = largest eigenvalue of G

by proximal gradient descent (Zhang et al., "MagR", 2024, §3; the group-wise variant): V ← prox(V − (V − W) G / λ), with
Nesterov's momentum, which needs a quarter of the steps. The prox of α‖·‖_∞ is v minus its projection onto the l1 ball of radius
α, and the projection is by sorting (Duchi et al. 2008). Its authors' code looks at the last calibration sequence only; G holds
all of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwha_cli.errors import NumericsError
from qwha_cli.quant.packed import check_group

_ITERATIONS = 40
_POWER_ITERATIONS = 30
# a power iteration approaches the largest eigenvalue from below; steps stay safe up to twice the true value
_EIGENVALUE_MARGIN = 1.05


def smooth(weight: Tensor, gram: Tensor, *, alpha: float, group_size: int, name: str, iterations: int = _ITERATIONS) -> Tensor:
    """Return a matrix with smaller extremes in every group and nearly the same output.

    Args:
        weight: W float32 (out, in); not written into.
        gram: G = XᵀX float32 (in, in), same device.
        alpha: α >= 0; 0 returns W.
        group_size: Consecutive inputs that share a scale; divides in.
        name: The layer, for errors.
        iterations: Gradient steps.

    Returns:
        V float32 (out, in).

    Raises:
        ModelError: The inputs are no whole number of groups.
        NumericsError: The objective is not finite or has grown.
    """
    check_group(name, weight.shape[1], group_size)
    norm = largest_eigenvalue(gram)
    smoothed = weight.clone(memory_format=torch.contiguous_format)
    if norm == 0:
        return smoothed
    normalised = gram / norm
    ahead, momentum = smoothed, 1.0
    before = _objective(weight, smoothed, normalised, alpha, group_size)
    for _ in range(iterations):
        groups = (ahead - (ahead - weight) @ normalised).view(-1, group_size)
        stepped = (groups - project_l1(groups, radius=alpha)).view(weight.shape)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = stepped + (momentum - 1) / following * (stepped - smoothed)
        smoothed, momentum = stepped, following
    after = _objective(weight, smoothed, normalised, alpha, group_size)
    # "not <=" also catches NaN, and below zero only a matrix that is no Gram matrix leads; the slack is float32's rounding
    if not 0 <= after <= before * (1 + 1e-4) + 1e-12:
        raise NumericsError(
            f"MagR diverged: its objective went from {before:.4g} to {after:.4g} with alpha {alpha:g}",
            where=f"layer {name}",
            remedy="check the calibration text, or turn it off with quantize.magr=null",
        )
    return smoothed


def project_l1(vectors: Tensor, *, radius: float) -> Tensor:
    """The nearest point of the l1 ball to each row, by sorting.

    Args:
        vectors: floating (rows, n).
        radius: Of the ball, >= 0.

    Returns:
        (rows, n), each with ‖·‖₁ <= radius; rows already inside come back unchanged.
    """
    sizes = vectors.abs()
    ordered = sizes.sort(dim=1, descending=True).values
    counts = torch.arange(1, vectors.shape[1] + 1, dtype=vectors.dtype, device=vectors.device)
    levels = (ordered.cumsum(1) - radius) / counts
    # ordered > levels holds for a leading stretch, whose last place gives the threshold; radius 0 leaves it empty
    last = ((ordered > levels).sum(1, keepdim=True) - 1).clamp_min(0)
    threshold = levels.gather(1, last).clamp_min(0)
    return vectors.sign() * (sizes - threshold).clamp_min(0)


def largest_eigenvalue(gram: Tensor) -> float:
    """A close upper estimate of λ_max of a symmetric positive semi-definite (n, n), by power iteration from a fixed start."""
    # the row sums of |G| lean towards the leading eigenvector and cannot be orthogonal to all of it, unlike a constant start
    vector = gram.abs().sum(1)
    value = 0.0
    for _ in range(_POWER_ITERATIONS):
        length = float(vector.norm())
        if length == 0:
            return 0.0
        vector = gram @ (vector / length)
        value = float(vector.norm())
    return value * _EIGENVALUE_MARGIN


def _objective(weight: Tensor, smoothed: Tensor, gram: Tensor, alpha: float, group_size: int) -> float:
    """½ tr(D G Dᵀ) + α Σ ‖v‖_∞, summed in float64."""
    difference = weight - smoothed
    fit = float(((difference @ gram) * difference).sum(dtype=torch.float64))
    return fit / 2 + alpha * float(smoothed.view(-1, group_size).abs().amax(1).sum(dtype=torch.float64))
