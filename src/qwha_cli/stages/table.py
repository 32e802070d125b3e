"""The table a run ends with, for the command line and `--json`: the report's rows, of the artifacts that answer this recipe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from qwha_cli.artifacts.manifest import own_manifest
from qwha_cli.recipe.schema import Recipe
from qwha_cli.report.table import TableRow, table_rows
from qwha_cli.stages.plan import FOLDERS, plan


def build_table(run: Path, recipe: Recipe) -> list[dict[str, object]]:
    """Return one record a row; a number that was not measured is None.

    Args:
        run: The run's folder.
        recipe: The recipe; artifacts made with other settings are left out.
    """
    planned = plan(recipe, root=run)
    folders = {name: run / folder for name, folder in FOLDERS.items()}
    found = {name: own_manifest(folder) for name, folder in folders.items()}
    current = {name: manifest for name, manifest in found.items() if manifest and manifest.key == planned[name].key}
    scores: dict[str, dict[str, object]] = {}
    if "eval" in current:
        rows = json.loads((folders["eval"] / "scores.json").read_text(encoding="utf-8"))["rows"]
        scores = {row["row"]: row for row in rows}
    return [_record(row) for row in table_rows(folders, current, scores=scores)]


def _record(row: TableRow) -> dict[str, object]:
    record = dataclasses.asdict(row)
    tasks: dict[str, list[object]] = {}
    for score in record["tasks"]:
        tasks.setdefault(score["task"], []).append(score)
    record["tasks"] = tasks
    return record
