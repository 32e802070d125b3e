"""Sub-matrices G_SS of one symmetric matrix for many sets S at once, the input of a batched Cholesky factorisation.

Sets of different size are padded to one width; the padding's rows and columns are those of the identity, so that it takes no
part.
"""

from __future__ import annotations

from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested, choose

OP = "sub_matrices"


def sub_matrices(square: Tensor, columns: Tensor, *, backend: Requested = "auto") -> Tensor:
    """Gather the rows and columns of each set.

    Args:
        square: (n + 1, n + 1), floating, symmetric, its last row and column zero.
        columns: int64 (batch, width), below n, or n in the padding.
        backend: Which implementation.

    Returns:
        (batch, width, width), dtype of square; the lower triangles. What is above them is not defined.

    Raises:
        KernelError: Shapes that do not fit, or a backend that this machine does not have.
    """
    if square.dim() != 2 or square.shape[0] != square.shape[1] or columns.dim() != 2:
        raise KernelError(f"a square matrix and sets in rows, got {tuple(square.shape)} and {tuple(columns.shape)}", where=OP)
    if choose(backend, op=OP, device=square.device).name == "triton":
        from qwha_cli.kernels import sub_matrices_triton

        return sub_matrices_triton.sub_matrices(square, columns)
    gathered = square[columns[:, :, None], columns[:, None, :]]
    gathered.diagonal(dim1=1, dim2=2).masked_fill_(columns == square.shape[0] - 1, 1.0)
    return gathered
