"""What an artifact says about itself: what was asked (its key), what came out (its files), and what was measured (its results).

`key = sha256(schema, stage, settings, keys of the inputs)`. Two artifacts with one key were asked for the same thing, so the
second need not be made. `results` hold numbers with the unit in the name; every fallback or skipped layer is a note.
A manifest is plain JSON; it does not hold tensors and does not know how stages work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qwha_cli.errors import ArtifactError

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of one file of an artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    Attributes:
        stage: The stage that made the artifact ("quantize", "init", ...).
        key: Identity of what was asked; see `artifact_key`.
        settings: The part of the recipe that the key covers.
        inputs: Stage name to key of every artifact that was read.
        files: Relative path to size and hash of every file but the manifest.
        results: Measurements, units in the names.
        notes: Fallbacks, skipped layers and choices that a person should know of.
        environment: Versions and devices the artifact was made with.
        created: UTC time of publication, ISO 8601.
        seconds: Wall time of the stage.
    """

    stage: str
    key: str
    settings: Mapping[str, object]
    inputs: Mapping[str, str]
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    results: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    environment: Mapping[str, object] = field(default_factory=dict)
    created: str = ""
    seconds: float = 0.0
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The manifest as indented JSON with a final newline."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Manifest:
        """Parse a manifest.

        Args:
            text: Contents of manifest.json.
            where: The file's path, for the error.

        Raises:
            ArtifactError: The text is no manifest of a schema that this version reads.
        """
        remedy = "delete the folder and run the stage again"
        try:
            raw = json.loads(text)
            if raw["schema"] != SCHEMA:
                raise ArtifactError(f"manifest schema {raw['schema']}, this version reads {SCHEMA}", where=where, remedy=remedy)
            raw["files"] = {name: FileRecord(**record) for name, record in raw["files"].items()}
            raw["notes"] = tuple(raw["notes"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"not a manifest: {error}", where=where, remedy=remedy) from error


def digest(value: object) -> str:
    """Return the sha256 (hex) of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def artifact_key(stage: str, settings: Mapping[str, object], *, inputs: Mapping[str, str]) -> str:
    """Return the identity of an artifact: sha256 over schema, stage, settings and the keys of its inputs."""
    return digest({"schema": SCHEMA, "stage": stage, "settings": settings, "inputs": inputs})


def read_manifest(folder: Path) -> Manifest | None:
    """Return an artifact's manifest, or None where the folder or its manifest does not exist.

    Raises:
        ArtifactError: There is a manifest.json, but it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    return Manifest.from_json(path.read_text(encoding="utf-8"), where=str(path))


def own_manifest(folder: Path) -> Manifest | None:
    """Return an artifact's manifest, or None where there is none or it is not one that this version reads."""
    try:
        return read_manifest(folder)
    except ArtifactError:
        return None
