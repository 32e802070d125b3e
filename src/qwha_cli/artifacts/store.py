"""Publishing artifacts: all or nothing, and nothing overwritten.

A stage writes into a hidden sibling of its final folder. Publication hashes every file, writes the manifest last, flushes all of
it to the disk and renames the sibling. So a folder with a manifest is complete, whatever killed the process. An artifact with
another key that stood in the place moves to `archive/` and comes back when its settings do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path

from qwha_cli.artifacts.manifest import MANIFEST, FileRecord, Manifest, own_manifest, read_manifest
from qwha_cli.errors import ArtifactError, ResourceError


@contextlib.contextmanager
def drafting(final: Path) -> Generator[Path]:
    """Yield an empty folder beside `final` to write into; it disappears unless `publish` renames it.

    Raises:
        ResourceError: The disk filled up while the block wrote.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(f".{final.name}.*.draft"):
        shutil.rmtree(stale)  # left by a killed process; the run's lock says that nobody is writing it now
    draft = final.parent / f".{final.name}.{os.getpid()}.draft"
    draft.mkdir()
    try:
        yield draft
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(final, error) from error
        raise
    finally:
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)


def disk_full(place: Path, error: OSError) -> ResourceError:
    """Return the error for a full disk at `place`, with the free space as found."""
    free = shutil.disk_usage(place.parent if place.parent.exists() else Path("/")).free / 2**20
    return ResourceError(
        f"the disk is full ({error.strerror or error}; {free:,.0f} MiB free)",
        where=str(place),
        remedy="free some space, or write elsewhere with `output=FOLDER`; finished stages are kept",
    )


def publish(draft: Path, final: Path, *, manifest: Manifest) -> Manifest:
    """Turn a draft into the artifact at `final`, atomically.

    Args:
        draft: The folder yielded by `drafting`.
        final: Where the artifact shall stand.
        manifest: What to write; `files` and `created` are filled in here.

    Returns:
        The manifest as written.
    """
    files = {}
    for path in sorted(p for p in draft.rglob("*") if p.is_file()):
        files[path.relative_to(draft).as_posix()] = FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
        _flush(path)
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    manifest = dataclasses.replace(manifest, files=files, created=now)
    (draft / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    _flush(draft / MANIFEST)
    _flush(draft)
    set_aside(final)
    draft.rename(final)
    _flush(final.parent)
    return manifest


def set_aside(final: Path) -> Path | None:
    """Move what stands at `final` into the run's archive and return its new place; None if nothing stands there."""
    if not final.exists():
        return None
    old = own_manifest(final)  # what is foreign or unreadable is kept all the same
    # shortened before the prefix goes on: a foreign folder must never be taken for an older copy of another one
    label = old.key[:12] if old else f"incomplete-{final.stat().st_mtime_ns}"
    target = _archived(final, label)
    if target.exists():
        shutil.rmtree(target)  # the same key: an older copy of the same thing
    target.parent.mkdir(parents=True, exist_ok=True)
    final.rename(target)
    return target


def bring_back(final: Path, key: str) -> bool:
    """Put an archived artifact with this key back into its place; False if there is none or it is damaged."""
    target = _archived(final, key[:12])
    manifest = own_manifest(target)
    if manifest is None or manifest.key != key or missing_files(target, manifest):
        return False
    set_aside(final)
    target.rename(final)
    return True


def _archived(final: Path, label: str) -> Path:
    return final.parent / "archive" / f"{final.name}-{label}"


def missing_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return the files that are absent or have another size than the manifest says."""
    return [
        name
        for name, record in manifest.files.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != record.bytes
    ]


def verify(folder: Path, *, deep: bool = False) -> Manifest:
    """Check an artifact and return its manifest.

    Args:
        folder: The artifact.
        deep: Compare contents (sha256) too, not only sizes.

    Raises:
        ArtifactError: No manifest, or files missing, of another size, or (deep) of other contents.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError("no complete artifact here", where=str(folder), remedy="run the stage that makes it")
    bad = missing_files(folder, manifest)
    if deep and not bad:
        bad = [name for name, record in manifest.files.items() if sha256_of(folder / name) != record.sha256]
    if bad:
        raise ArtifactError(
            f"{len(bad)} of {len(manifest.files)} files are missing or changed: {', '.join(bad[:3])}",
            where=str(folder),
            remedy=f"delete {folder} and run the {manifest.stage} stage again",
        )
    return manifest


@contextlib.contextmanager
def locked(run: Path) -> Generator[None]:
    """Hold a run folder for this process; the lock falls with the process, however it ends.

    Raises:
        ArtifactError: Another process is working on this run.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            raise ArtifactError(
                f"another process is working on this run (pid {handle.read().strip() or 'unknown'})",
                where=str(run),
                remedy="wait for it, or give this run another `name=`",
            ) from error
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield


def sha256_of(path: Path) -> str:
    """Return the sha256 (hex) of a file, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file by a temporary sibling and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
