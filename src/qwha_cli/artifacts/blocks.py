"""What a stage has finished of its blocks, kept in its work folder so that a killed run continues behind the last of them.

    blocks/0003.safetensors   the tensors of block 3
    blocks/0003.json          its records; written last, so a block with this file is finished

The work folder is named by the stage's key: what lies in it was made with the same settings from the same inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwha_cli.artifacts.store import write_atomically
from qwha_cli.artifacts.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

Record = dict[str, object]


class FinishedBlocks:
    """The finished blocks of one stage.

    Args:
        work: The stage's work folder.
    """

    def __init__(self, work: Path) -> None:
        self._folder = work / "blocks"
        self._folder.mkdir(parents=True, exist_ok=True)

    def records(self, index: int) -> list[Record] | None:
        """The records of a finished block; None if it is not finished."""
        path = self._folder / f"{index:04d}.json"
        if not path.is_file() or not self.tensor_file(index).is_file():
            return None
        records: list[Record] = json.loads(path.read_text(encoding="utf-8"))
        return records

    def count(self) -> int:
        """How many blocks are finished."""
        return sum(self.records(int(path.stem)) is not None for path in self._folder.glob("[0-9]*.json"))

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block, on the CPU."""
        return read_tensors(self.tensor_file(index))

    def tensor_file(self, index: int) -> Path:
        """Where a block's tensors lie."""
        return self._folder / f"{index:04d}.safetensors"

    def save(self, index: int, tensors: Mapping[str, Tensor], records: Sequence[Record]) -> None:
        """Keep a block; after this returns, it survives whatever happens to the process."""
        write_tensors(self.tensor_file(index), tensors)
        write_atomically(self._folder / f"{index:04d}.json", json.dumps(list(records)))
