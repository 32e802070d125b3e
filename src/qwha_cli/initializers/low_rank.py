"""Start values of LoRA from the quantization error: CLoQ, QERA-approx, LoftQ, and none.

With D = W − Q̂ in the weight basis, every method here wants the B A of given rank that minimises ‖(D − B A) S‖² for its own S:

    cloq   S Sᵀ = G + λI       the outputs' error on the calibration inputs, G = XᵀX (Deng et al. 2025, arXiv 2501.18475)
    qera   S = diag(G)^(1/2)   the same as if inputs were uncorrelated: QERA-approx (Zhang et al. 2024, arXiv 2410.06040).
                               QERA-exact has S Sᵀ = G, which is cloq's optimum without damping
    loftq  S = I               the weights' error: LoftQ (Li et al. 2023, arXiv 2310.08659) with T = 1, on the base as the
                               quantize stage made it; LoftQ's alternation, which quantizes W − B A again, is not done

The truncated SVD D S ≈ U Σ Vᵀ (Eckart and Young) gives B A = U Σ Vᵀ S⁻¹ = U Uᵀ D. So only the r leading left singular vectors are
needed, S is never inverted, and as U Uᵀ is a projection no method can raise the error, on whatever inputs it is measured. They
come from the eigenvectors of the smaller of (D S)(D S)ᵀ and (D S)ᵀ(D S), in float64, because squaring halves the digits.

How B A is split into factors does not follow from the optimum. Here all methods share LoftQ's split, half of the product's own
singular values to each side, B = P √Σ' and A = √Σ' Qᵀ of B A = P Σ' Qᵀ: then both factors see gradients of one size, whatever
units the inputs have. (CLoQ's authors discuss several splits; this one is chosen, not theirs.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwha_cli.errors import NumericsError
from qwha_cli.initializers.budget import InitOptions
from qwha_cli.kernels.low_rank import LowRank

# CLoQ's
_DAMPING = 0.01
# singular values below this share of the largest are rounding: the error itself has a lower rank than was asked for
_NEGLIGIBLE = 1e-10


def cloq(delta: Tensor, gram: Tensor, *, rank: int, options: InitOptions) -> LowRank:
    """The factors that minimise tr((D − B A)(G + λI)(D − B A)ᵀ), exactly.

    Args:
        delta: D = W − Q̂ (out, in), floating, in the weight basis.
        gram: G (in, in), floating, of the inputs in the weight basis, same device.
        rank: Of the update; at most the smaller side of delta.
        options: damping (λ as a share of the mean of G's diagonal; None for CLoQ's 0.01) and seed are read.

    Returns:
        B A, float32 factors with both sides' columns of one length.

    Raises:
        NumericsError: A rank that does not fit, numbers that are not finite, a Gram matrix that is not positive definite.
    """
    _check(delta, gram, rank)
    damped = gram.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    # inputs without any energy say nothing: all weights count alike then
    diagonal += options.damping_or(_DAMPING) * mean if mean > 0 else 1.0
    root, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) != 0 or not bool(torch.isfinite(root).all()):
        raise NumericsError(
            f"the damped Gram matrix of {gram.shape[0]} inputs is not positive definite",
            remedy="raise init.damping, or calibrate with more samples",
        )
    return _projected(delta, delta.double() @ root, rank=rank, seed=options.seed)


def qera(delta: Tensor, gram: Tensor, *, rank: int, options: InitOptions) -> LowRank:
    """The factors that minimise the error with each input weighted by its mean square: QERA-approx.

    Args:
        delta: As for `cloq`.
        gram: As for `cloq`; only its diagonal is read.
        rank: As for `cloq`.
        options: seed is read.

    Returns:
        As for `cloq`.

    Raises:
        NumericsError: A rank that does not fit, or numbers that are not finite.
    """
    _check(delta, gram, rank)
    return _projected(delta, delta.double() * gram.diagonal().double().clamp(min=0).sqrt(), rank=rank, seed=options.seed)


def loftq(delta: Tensor, gram: Tensor, *, rank: int, options: InitOptions) -> LowRank:
    """The factors that minimise the weights' own error ‖D − B A‖²: LoftQ's step on a given base.

    Args:
        delta: As for `cloq`.
        gram: As for `cloq`; not used.
        rank: As for `cloq`.
        options: seed is read.

    Returns:
        As for `cloq`.

    Raises:
        NumericsError: A rank that does not fit, or numbers that are not finite.
    """
    _check(delta, gram, rank)
    return _projected(delta, delta.double(), rank=rank, seed=options.seed)


def zero(delta: Tensor, gram: Tensor, *, rank: int, options: InitOptions) -> LowRank:
    """LoRA's usual start, as QLoRA has it: A uniform in ±1/√in (peft's default), B zero.

    The adapted model starts as the quantized base, bit for bit.

    Args:
        delta: As for `cloq`; only its shape and device are read.
        gram: As for `cloq`; not used.
        rank: As for `cloq`.
        options: seed is read.

    Returns:
        Float32 factors with B = 0.

    Raises:
        NumericsError: A rank that does not fit, or numbers that are not finite.
    """
    _check(delta, gram, rank)
    return _untrained((delta.shape[0], delta.shape[1]), rank=rank, seed=options.seed, device=delta.device)


def _check(delta: Tensor, gram: Tensor, rank: int) -> None:
    out_features, in_features = delta.shape
    if not 1 <= rank <= min(out_features, in_features):
        raise NumericsError(
            f"rank {rank} does not fit a weight of {out_features} x {in_features}",
            remedy="lower adapter.rank, or exclude the layer",
        )
    if not bool(torch.isfinite(delta).all()):
        raise NumericsError("the quantization error is not finite", remedy="check the quantized base and the model's weights")
    if not bool(torch.isfinite(gram).all()):
        raise NumericsError("the Gram matrix is not finite", remedy="check the calibration data")


def _untrained(shape: tuple[int, int], *, rank: int, seed: int, device: torch.device) -> LowRank:
    out_features, in_features = shape
    # drawn on the CPU: the same numbers on every device
    generator = torch.Generator().manual_seed(seed)
    a = (2 * torch.rand(rank, in_features, generator=generator) - 1) / math.sqrt(in_features)
    return LowRank(a.to(device), torch.zeros(out_features, rank, device=device))


def _projected(delta: Tensor, weighted: Tensor, *, rank: int, seed: int) -> LowRank:
    """U Uᵀ D as balanced factors, U the leading left singular vectors of the weighted error D S (out, in), float64."""
    basis = _leading(weighted, rank)
    left, sizes, right = torch.linalg.svd(basis.mT @ delta.double(), full_matrices=False)
    left = basis @ left
    # an SVD is free to flip signs from one device or library to the next
    pivots = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(pivots < 0, -1.0, 1.0).to(left.dtype)
    roots = sizes.sqrt()
    a, b = (signs * roots).mT * right, left * (signs * roots)
    # what is zero on both sides would never get a gradient: there, start as LoRA without an error to undo does
    used = sizes > _NEGLIGIBLE * sizes.max()
    untrained = _untrained((delta.shape[0], delta.shape[1]), rank=rank, seed=seed, device=delta.device)
    return LowRank(torch.where(used[:, None], a.float(), untrained.a), torch.where(used[None, :], b.float(), untrained.b))


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (out, rank) that span the leading left singular vectors of a matrix (out, in)."""
    out_features, in_features = matrix.shape
    if out_features <= in_features:
        return torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -rank:].flip(1)
    right = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, -rank:].flip(1)
    return torch.linalg.qr(matrix @ right).Q
