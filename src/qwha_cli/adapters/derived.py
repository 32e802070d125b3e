"""What is computed from a layer's tensors, kept between calls and outside of the module tree.

A buffer would land in the adapter's file and in every broadcast between ranks. Kept here instead, a result is valid as long as
the very tensors that it came from are still in place and unwritten: a move to another device or dtype makes new tensors, an
optimizer's step or `load_state_dict` raises their version. So nothing has to remember to invalidate. Copies start empty.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from qwha_cli.kernels.stand_in import version_of

T = TypeVar("T")


@dataclass(frozen=True)
class _Entry(Generic[T]):
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    result: T


class Derived(Generic[T]):
    """A small cache of tensors, or of values made of tensors, by key, each tied to the tensors it was computed from."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry[T]] = {}

    def get(self, key: Hashable, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
        """The stored result, or a new one if a source was replaced or written to.

        Args:
            key: What is computed.
            sources: The tensors that `make` reads.
            make: Computes the result. Runs without gradients and, whatever mode the caller is in, outside of inference mode:
                an inference tensor could not be saved for a backward pass later.
        """
        entry = self._entries.get(key)
        if entry is not None and _unchanged(entry, sources):
            return entry.result
        with torch.inference_mode(False), torch.no_grad():
            result = make()
        self._entries[key] = _Entry(tuple(sources), tuple(version_of(source) for source in sources), result)
        return result

    def renew(self, key: Hashable, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
        """As `get`, but an outdated tensor, or tuple of them, gets its new numbers where it lies, for those who read there."""
        entry = self._entries.get(key)
        if entry is None or _unchanged(entry, sources):
            return self.get(key, sources, make)
        with torch.inference_mode(False), torch.no_grad():
            for old, new in zip(_tensors(entry.result), _tensors(make()), strict=True):
                old.copy_(new)
        self._entries[key] = _Entry(tuple(sources), tuple(version_of(source) for source in sources), entry.result)
        return entry.result

    def clear(self) -> None:
        """Drop everything, also the references to the sources."""
        self._entries.clear()

    def __iter__(self) -> Iterator[Hashable]:
        """The keys of what is kept, outdated or not."""
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict[int, object]) -> Derived[T]:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived[T]], tuple[()]]:
        return Derived, ()


def _tensors(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else cast("tuple[Tensor, ...]", result)


def _unchanged(entry: _Entry[T], sources: Sequence[Tensor]) -> bool:
    return len(entry.sources) == len(sources) and all(
        one is other and version == version_of(other)
        for one, version, other in zip(entry.sources, entry.versions, sources, strict=True)
    )
