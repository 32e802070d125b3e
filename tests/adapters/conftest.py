"""One adapted layer over any kind of base."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qwha_cli.adapters.spectral.layer import SpectralLinear
from qwha_cli.kernels.sparse_matmul import SparseRows
from support.adapted import base_of, random_sparse


@pytest.fixture
def make_layer() -> Callable[..., SpectralLinear]:
    def make(kind: str, *, scale: float = 1.0, rows: SparseRows | None = None) -> SpectralLinear:
        layer = SpectralLinear(base_of(kind))
        layer._active_adapter = ["default"]
        layer.update_layer("default", start=rows or random_sparse((80, 48)), scale=scale, transform="wht")
        return layer.eval()

    return make
