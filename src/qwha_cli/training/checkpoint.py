"""Checkpoints of a training run: all or nothing, refused when foreign, the last two kept.

A checkpoint is a folder `step-000050` with `tensors.safetensors` (values and optimizer state by name) and `state.json` (step,
identity, seconds). It is written into a hidden sibling, flushed and renamed, so whatever kills the process leaves either the
new one whole or the one before. No pickle. Random state is not saved: every step seeds it from (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwha_cli.artifacts.store import disk_full
from qwha_cli.errors import ArtifactError

SCHEMA = 1
KEPT = 2
_STATE = "state.json"
_TENSORS = "tensors.safetensors"


@dataclass(frozen=True)
class CheckpointState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        identity: Digest of everything that must not change between sessions: settings, data, base, starting values.
        wall_s: Seconds of training so far.
        ranks: Processes that trained when it was written; another number may go on, to rounding. 0 where nobody noted it.
    """

    step: int
    identity: str
    wall_s: float
    ranks: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back; `tensors` as `KIND/NAME` on the CPU."""

    folder: Path
    state: CheckpointState
    tensors: dict[str, Tensor]


def save_checkpoint(folder: Path, state: CheckpointState, *, tensors: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint and drop all but the last two.

    Args:
        folder: Where the run's checkpoints live; made when absent.
        state: Where the run stands.
        tensors: Values and optimizer state, on the CPU.

    Returns:
        The checkpoint's folder.

    Raises:
        ResourceError: The disk is full; the checkpoints before are untouched.
    """
    final = folder / f"step-{state.step:06d}"
    draft = folder / f".{final.name}.{os.getpid()}.tmp"
    with _writing(draft, final):
        save_file(dict(tensors), draft / _TENSORS)
        (draft / _STATE).write_text(json.dumps({"schema": SCHEMA, **asdict(state)}, indent=2) + "\n", encoding="utf-8")
        for path in (draft / _TENSORS, draft / _STATE, draft):
            _flush(path)
        if final.exists():  # an unreadable one that was passed over on resume
            shutil.rmtree(final)
        draft.rename(final)
        _flush(folder)
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def remove_drafts(folder: Path) -> None:
    """Remove the drafts of checkpoints that a killed process left."""
    for draft in folder.glob(".step-*.tmp"):
        shutil.rmtree(draft)


def load_latest(folder: Path, *, identity: str) -> Checkpoint | None:
    """Read the newest readable checkpoint, or None when there is none to continue from.

    Args:
        folder: Where the run's checkpoints live.
        identity: What the caller is about to train; must equal the checkpoint's.

    Raises:
        ArtifactError: The checkpoint belongs to other settings or data, or none of those present can be read.
    """
    found = list_checkpoints(folder)
    faults: list[str] = []
    for path in reversed(found):
        try:
            fields = json.loads((path / _STATE).read_text(encoding="utf-8"))
            state = CheckpointState(fields["step"], fields["identity"], fields["wall_s"], ranks=fields.get("ranks", 0))
            tensors = load_file(path / _TENSORS)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            faults.append(f"{path.name}: {error}")
            continue
        if state.identity != identity:
            raise ArtifactError(
                f"the checkpoint belongs to another training run: it says {state.identity}, this run is {identity}",
                where=str(path),
                remedy=f"restore the settings and data it was made with, or delete {folder} to train from the start",
            )
        return Checkpoint(folder=path, state=state, tensors=tensors)
    if found:
        raise ArtifactError(
            f"no checkpoint can be read ({'; '.join(faults)})",
            where=str(folder),
            remedy=f"delete {folder} to train from the start",
        )
    return None


@contextlib.contextmanager
def _writing(draft: Path, final: Path) -> Generator[None]:
    """Make the draft folder for the block, remove it afterwards if it still stands, and translate a full disk."""
    try:
        draft.mkdir(parents=True)
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(final, error) from error
        raise
    except SafetensorError as error:
        # safetensors writes from Rust and reports the operating system's error only as text.
        if "StorageFull" in str(error) or "os error 28" in str(error) or "code: 28" in str(error):
            raise disk_full(final, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
