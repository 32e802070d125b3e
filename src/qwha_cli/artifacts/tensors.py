"""Tensor files written as they come and joined at the end without being held in memory.

A stage that works block by block writes each block's tensors into a file of its own, at once and atomically, so that a killed
process loses one block at most. `join` then copies their bytes into the few files of a Hugging Face folder. The format is
safetensors: 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from qwha_cli.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

_COPY_BYTES = 1 << 24
_METADATA = "__metadata__"
# bytes an element; what is not listed has one
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a safetensors file that appears whole or not at all.

    Args:
        path: Where; its folder exists.
        tensors: Any device; moved to the CPU and made contiguous.
    """
    from safetensors.torch import save_file

    draft = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft, metadata={"format": "pt"})
    with draft.open("rb") as stream:
        os.fsync(stream.fileno())
    draft.replace(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ArtifactError: The file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot read these tensors: {error}", where=str(path), remedy="delete the file and run again"
        ) from error


def join(parts: Sequence[Path], folder: Path, *, shard_bytes: int) -> None:
    """Copy the tensors of several files into model.safetensors, or into shards with an index, as transformers reads them.

    Args:
        parts: safetensors files with disjoint names, in the order to be kept; they are not changed.
        folder: Where to write.
        shard_bytes: Most data of a file, unless a single tensor is larger.

    Raises:
        ArtifactError: A part is no safetensors file or ends too early, or a name occurs twice.
    """
    tensors = [tensor for part in parts for tensor in _read_header(part)]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ArtifactError("a tensor's name occurs twice", where=str(folder), remedy="run the stage again")
    shards: list[list[_Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: its name, what the header says of it, and where its bytes lie."""

    name: str
    entry: dict[str, object]
    path: Path
    start: int
    size: int


def _read_header(path: Path) -> list[_Stored]:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = cast("dict[str, dict[str, object]]", json.loads(stream.read(length)))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"this is no safetensors file: {error}", where=str(path), remedy="delete it and run again") from error
    found: list[_Stored] = []
    for name, entry in header.items():
        if name != _METADATA:
            begin, end = cast("list[int]", entry["data_offsets"])
            found.append(_Stored(name, entry, path, 8 + length + begin, end - begin))
    return found


def _write_shard(path: Path, tensors: Sequence[_Stored]) -> None:
    # widest dtypes first, as safetensors itself does: every tensor then begins at a multiple of its element's size
    order = sorted(tensors, key=lambda tensor: -_WIDTHS.get(str(tensor.entry["dtype"]), 1))
    header: dict[str, dict[str, object]] = {_METADATA: {"format": "pt"}}
    offset = 0
    for tensor in order:
        header[tensor.name] = {**tensor.entry, "data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as the format asks
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(path.open("wb"))
        sources = {part: stack.enter_context(part.open("rb")) for part in {tensor.path for tensor in order}}
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for tensor in order:
            sources[tensor.path].seek(tensor.start)
            _copy(sources[tensor.path], out, tensor.size)


def _copy(source: BinaryIO, out: BinaryIO, count: int) -> None:
    while count:
        data = source.read(min(count, _COPY_BYTES))
        if not data:
            raise ArtifactError(
                "a tensor file ends too early", where=str(getattr(source, "name", "")), remedy="run the stage again"
            )
        out.write(data)
        count -= len(data)
