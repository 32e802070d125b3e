"""Where the entries of a sparse matrix F lie, in the form that the adapted layer reads at every step.

Compressed rows with columns of 16 bits: a quarter of what 64-bit indices take, and each program of a kernel finds its row's
entries side by side. The form on disk is another one, see gaps.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from qwha_cli.kernels.sparse_matmul import SparseRows

_SHORT_LIMIT = 2**16


@dataclass(frozen=True, eq=False)
class Places:
    """The places of F (out, in), row by row, none twice.

    Attributes:
        row_starts: (out + 1,) int32; row i holds entries row_starts[i] .. row_starts[i + 1] − 1.
        columns: (nnz,) uint16, or int32 where in > 2^16; ascending in each row.
        shape: (out, in).
    """

    row_starts: Tensor
    columns: Tensor
    shape: tuple[int, int]
    _span_starts: dict[int, Tensor] = field(default_factory=dict[int, Tensor], init=False, repr=False)

    @classmethod
    def from_rows(cls, rows: SparseRows) -> Places:
        """The places of existing entries, on their device."""
        kind = torch.uint16 if rows.shape[1] <= _SHORT_LIMIT else torch.int32
        return cls(rows.row_starts, rows.columns.to(kind), rows.shape)

    @classmethod
    def from_flat(cls, flat_index: Tensor, *, shape: tuple[int, int]) -> Places:
        """Places given in the flattened matrix.

        Args:
            flat_index: (nnz,) int32, row · in + column, ascending and without repeats.
            shape: (out, in); out · in < 2^31.
        """
        return cls.from_rows(SparseRows.from_flat(flat_index, flat_index, shape=shape))

    @classmethod
    def union(cls, parts: Sequence[Places]) -> tuple[Places, Tensor]:
        """All places of several matrices, each once.

        Args:
            parts: Of one shape, on one device.

        Returns:
            The places, and for the entries of all parts, one part after the other, which of them is theirs: int32 (nnz of all,).
        """
        flat, entry = torch.cat([part.flat_index for part in parts]).unique(return_inverse=True)
        return cls.from_flat(flat, shape=parts[0].shape), entry.to(torch.int32)

    def __len__(self) -> int:
        """Entries."""
        return self.columns.numel()

    def with_values(self, values: Tensor) -> SparseRows:
        """F itself, from values (nnz,) on the same device."""
        return SparseRows(self.row_starts, self.columns.to(torch.int32), values, self.shape)

    @cached_property
    def flat_index(self) -> Tensor:
        """(nnz,) int32: row · in + column. Made at the first use, by the torch forms of ops only."""
        with torch.inference_mode(False), torch.no_grad():
            return self.with_values(self.columns).flat_index()

    def span_starts(self, span: int) -> Tensor:
        """Where the entries of each row's spans begin: kernels take rows in pieces of so many columns.

        Args:
            span: Columns; the last span of a row may have fewer.

        Returns:
            (out · spans + 1,) int32: entries s[i] .. s[i + 1] − 1 lie in row i // spans and its span i % spans. Made at the first
            use and kept.
        """
        out_features, in_features = self.shape
        if span >= in_features:
            return self.row_starts
        found = self._span_starts.get(span)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                # not flat_index itself, which would be kept
                flat = self.with_values(self.columns).flat_index()
                first = torch.arange(0, in_features, span, dtype=torch.int32, device=flat.device)
                rows = torch.arange(out_features, dtype=torch.int32, device=flat.device) * in_features
                edges = (rows[:, None] + first).view(-1)
                found = torch.cat([torch.searchsorted(flat, edges, out_int32=True), self.row_starts[-1:]])
            self._span_starts[span] = found
        return found
