"""Round to nearest: every weight to the nearest value of its group's grid, each by itself.

The base line. With `grid: search` the Gram matrix's diagonal says which inputs matter when the grid is chosen; the rounding
itself looks at the weights alone.
"""

from __future__ import annotations

from torch import Tensor

from qwha_cli.quant.gram import Gram
from qwha_cli.quant.packed import PackedWeight, QuantizerOptions
from qwha_cli.quantizers.grid import find_grid


def quantize(weight: Tensor, gram: Gram | None, *, options: QuantizerOptions, name: str) -> PackedWeight:
    """Quantize a matrix by rounding.

    Args:
        weight: float32 (out, in), in the basis to be quantized; not written into.
        gram: XᵀX of the inputs in the same basis, or None; only its diagonal is used.
        options: Bits, group size, grid.
        name: The layer, for errors.

    Returns:
        The codes, on the weight's device.

    Raises:
        ModelError: The inputs are no whole number of groups.
        NumericsError: A weight is not finite.
    """
    grid = find_grid(weight, options=options, name=name, importance=gram.importance() if gram is not None else None)
    return PackedWeight.from_codes(grid.codes(weight), grid.scales, grid.zeros, format=options.format)
