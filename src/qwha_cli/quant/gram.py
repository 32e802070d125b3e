"""The Gram matrix of a layer's inputs as a value, with everything derived from it computed once.

G = XᵀX (in, in) says what an error in the weight costs in the output: tr(E G Eᵀ). Layers with one input (q, k and v; gate and up)
share one object, hence one Hadamard transform and one factorisation. What is derived is made on first use and kept until the
object goes or `forget` is called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwha_cli.errors import NumericsError
from qwha_cli.kernels.wht import transform_gram


class Gram:
    """XᵀX of some inputs in one basis.

    Args:
        matrix: float32 or float64 (in, in), symmetric; shared, not copied.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._transformed: Gram | None = None
        self._damped: dict[float, Tensor] = {}
        self._factors: dict[float, Tensor] = {}

    @property
    def size(self) -> int:
        """Number of inputs."""
        return self.matrix.shape[0]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.matrix.device

    def check_finite(self, name: str) -> None:
        """Refuse a matrix that calibration filled with values that are not finite.

        Raises:
            NumericsError: It did; `name` is the layer.
        """
        if not bool(torch.isfinite(self.matrix).all()):
            raise NumericsError(
                "calibration produced values that are not finite",
                where=f"layer {name}",
                remedy="load the model with model.dtype=float32, or use other calibration text",
            )

    def importance(self) -> Tensor | None:
        """The diagonal relative to its mean, (in,); None for inputs without any energy."""
        diagonal = self.matrix.diagonal().clamp_min(0)
        mean = diagonal.mean()
        return diagonal / mean if float(mean) > 0 else None

    def in_hadamard_basis(self) -> Gram:
        """That of the transformed inputs X H: Hᵀ G H."""
        if self._transformed is None:
            self._transformed = Gram(transform_gram(self.matrix))
        return self._transformed

    def damped(self, damping: float) -> Tensor:
        """G + damping · mean(diag G) · I; inputs that were always zero get the mean itself. Identity for inputs without energy.

        Args:
            damping: Fraction of the mean of the diagonal.

        Returns:
            float32 (in, in). Not to be written into.
        """
        if damping not in self._damped:
            self._damped[damping] = self._damp(damping, torch.float32)
        return self._damped[damping]

    def inverse_factor(self, damping: float, *, name: str) -> Tensor:
        """The upper triangular U with (damped G)⁻¹ = Uᵀ U.

        Args:
            damping: As in `damped`.
            name: The layer, for errors.

        Returns:
            float32 (in, in), computed in float64. Not to be written into.

        Raises:
            NumericsError: G is not finite, or the factorisation fails.
        """
        if damping not in self._factors:
            self._factors[damping] = self._factorise(damping, name).to(torch.float32)
        return self._factors[damping]

    def forget(self) -> None:
        """Drop what was derived, to free its memory."""
        self._transformed = None
        self._damped.clear()
        self._factors.clear()

    def _damp(self, damping: float, dtype: torch.dtype) -> Tensor:
        damped = self.matrix.to(dtype, copy=True)
        diagonal = damped.diagonal()
        mean = float(self.matrix.diagonal().double().mean())
        if mean == 0:
            return damped.copy_(torch.eye(self.size, dtype=dtype, device=self.device))
        diagonal[diagonal == 0] = mean
        diagonal += damping * mean
        return damped

    def _factorise(self, damping: float, name: str) -> Tensor:
        # float64: with a small damping float32 is not enough for an ill-conditioned G, and this is not what takes the time
        damped = self._damp(damping, torch.float64)
        # With P the reversal and P G P = L Lᵀ, U = P L⁻¹ P: one factorisation and one triangular inverse, and never G⁻¹ itself
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) != 0 or not bool(torch.isfinite(lower).all()):
            raise NumericsError(
                f"the Gram matrix of {self.size} inputs with damping {damping:g} has no Cholesky factorisation",
                where=f"layer {name}",
                remedy="raise quantize.damping, or take more calibration text with quantize.calibration.samples",
            )
        del damped
        identity = torch.eye(self.size, dtype=torch.float64, device=self.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
