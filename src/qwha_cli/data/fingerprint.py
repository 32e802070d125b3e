"""What identifies training or calibration data in an artifact's key: changed data must make a stage stale."""

from __future__ import annotations

import hashlib
from importlib import resources

from qwha_cli.data import files, synthetic


def fingerprint(name: str, path: str | None) -> str:
    """sha256 of a local file or folder, of the text or generator that ships with the package, else of the name.

    Args:
        name: A name of the catalogue, or a `.txt` or `.jsonl` file.
        path: Local copy of a named data set; None for the hub or the package.

    Raises:
        DataError: The local file does not exist.
    """
    if path is not None:
        return files.file_digest(path)
    if name.endswith((".txt", ".jsonl", ".json")):
        return files.file_digest(name)
    if name == "prose":
        digest = hashlib.sha256()
        for entry in sorted((resources.files("qwha_cli.data") / "texts").iterdir(), key=lambda entry: entry.name):
            digest.update(entry.read_bytes() if entry.name.endswith(".txt") else b"")
        return digest.hexdigest()
    version = f"/{synthetic.VERSION}" if name == "synthetic" else ""
    return hashlib.sha256(f"{name}{version}".encode()).hexdigest()
