"""Sparse rows F (CSR) and the product z Fᵀ.

`SparseRows` is the value that passes between initializers, adapters and stages: F (out, in) with ascending columns in each row
and int32 indices. Training never multiplies by F in this form (spectral_linear.py scatters it into the dense weight); the product
here serves few tokens and checks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwha_cli.errors import KernelError

_INT32_LIMIT = 2**31


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A sparse matrix F (out, in), row by row.

    Attributes:
        row_starts: (out + 1,) int32; row i holds entries row_starts[i] .. row_starts[i + 1] − 1.
        columns: (nnz,) int32, ascending and without repeats in each row.
        values: (nnz,) floating, float32 when an initializer made it.
        shape: (out, in).
    """

    row_starts: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, dense_values: Tensor, mask: Tensor) -> SparseRows:
        """The entries of a dense matrix where a mask is set, zeros included.

        Args:
            dense_values: (out, in), floating.
            mask: (out, in) bool, same device.
        """
        out_features, in_features = mask.shape
        starts = torch.zeros(out_features + 1, dtype=torch.int32, device=mask.device)
        starts[1:] = mask.sum(dim=1).cumsum(dim=0)
        # nonzero walks row by row, so the columns come out ascending
        columns = mask.nonzero()[:, 1].to(torch.int32)
        return cls(starts, columns, dense_values[mask], (out_features, in_features))

    @classmethod
    def from_flat(cls, flat_index: Tensor, values: Tensor, *, shape: tuple[int, int]) -> SparseRows:
        """Entries given by their places in the flattened matrix.

        Args:
            flat_index: (nnz,) int32, row · in + column, ascending and without repeats.
            values: (nnz,), floating, same device.
            shape: (out, in); out · in < 2^31.
        """
        out_features, in_features = shape
        edges = torch.arange(out_features + 1, dtype=torch.int32, device=flat_index.device) * in_features
        return cls(torch.searchsorted(flat_index, edges, out_int32=True), flat_index % in_features, values, shape)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SparseRows:
        """The same rows on another device and, if given, with values of another dtype; indices stay int32."""
        return SparseRows(
            self.row_starts.to(device), self.columns.to(device), self.values.to(device=device, dtype=dtype), self.shape
        )

    def with_values(self, values: Tensor) -> SparseRows:
        """Other values (nnz,) at the same places."""
        return SparseRows(self.row_starts, self.columns, values, self.shape)

    def rounded(self, dtype: torch.dtype) -> SparseRows:
        """The same entries with values that `dtype` holds exactly, in the number format that they had."""
        return self.with_values(self.values.to(dtype).to(self.values.dtype))

    def counts(self) -> Tensor:
        """(out,) int32: entries of each row."""
        return self.row_starts[1:] - self.row_starts[:-1]

    def row_index(self) -> Tensor:
        """(nnz,) int32: the row of each entry."""
        rows = torch.arange(self.shape[0], dtype=torch.int32, device=self.columns.device)
        return torch.repeat_interleave(rows, self.counts(), output_size=self.columns.numel())

    def flat_index(self) -> Tensor:
        """(nnz,) int32: row · in + column, the place of each entry in the flattened dense matrix.

        Raises:
            KernelError: out · in >= 2^31, where int32 ends.
        """
        if self.shape[0] * self.shape[1] >= _INT32_LIMIT:
            raise KernelError(f"a matrix of {self.shape[0]} x {self.shape[1]} entries does not fit 32-bit indices")
        return self.row_index() * self.shape[1] + self.columns

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """F as a dense (out, in) matrix, of the values' dtype unless another is given."""
        values = self.values.to(dtype) if dtype is not None else self.values
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=values.dtype, device=values.device)
        return flat.index_add(0, self.flat_index(), values).reshape(self.shape)


def sparse_matmul(z: Tensor, rows: SparseRows) -> Tensor:
    """Multiply by a sparse matrix: z Fᵀ.

    Args:
        z: (..., in), floating, on the device of rows.
        rows: F (out, in).

    Returns:
        (..., out), dtype of z; summed in float32 at least. Differentiable in z and in the values.

    Raises:
        KernelError: z's last dimension is not F's number of columns.
    """
    out_features, in_features = rows.shape
    if z.shape[-1] != in_features:
        raise KernelError(f"z has {z.shape[-1]} columns, the sparse matrix has {in_features}")
    tokens = z.reshape(-1, in_features)
    dtype = torch.promote_types(z.dtype, torch.float32)
    # entry-wise work holds tokens x nnz products: past this the dense matrix is the smaller object
    if tokens.shape[0] * rows.columns.numel() > out_features * in_features:
        return torch.nn.functional.linear(z, rows.dense(z.dtype))
    products = tokens.index_select(1, rows.columns).to(dtype) * rows.values.to(dtype)
    result = torch.zeros((tokens.shape[0], out_features), dtype=dtype, device=z.device)
    return result.index_add(1, rows.row_index(), products).reshape(*z.shape[:-1], out_features).to(z.dtype)
