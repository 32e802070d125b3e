"""Where converted models are kept, and how one gets there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from qwha_cli.errors import ResourceError


def cache_root() -> Path:
    """$QWHA_CACHE, or ~/.cache/qwha."""
    return Path(os.environ.get("QWHA_CACHE") or Path.home() / ".cache" / "qwha").expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Fill a folder of the cache if it is not there.

    It is built in a temporary sibling and renamed, so a killed or failed build leaves nothing that looks complete, and two
    processes that build at once both end with a whole one.

    Args:
        folder: Where the result belongs.
        build: Fills an empty folder.

    Returns:
        `folder`.

    Raises:
        ResourceError: The cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        build(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its result is as good
                raise
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _unwritable(folder: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"cannot write the model cache: {error.strerror or error}",
        where=str(folder.parent),
        remedy="free some disk space, or set QWHA_CACHE to a folder with room",
    )
