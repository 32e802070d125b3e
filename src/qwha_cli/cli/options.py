"""The arguments and options that commands share. Every option is short for a recipe key, or says how to report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from qwha_cli.recipe.shipped import list_shipped


def _complete_recipe(incomplete: str) -> Iterable[str]:
    return [recipe.name for recipe in list_shipped() if recipe.name.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A path, or the name of a shipped recipe (`qwha recipes ls`).", autocompletion=_complete_recipe
    ),
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, e.g. train.lr=2e-4 adapter.rank=32.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.", rich_help_panel="Output")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel="Output")]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="Short for model.device=...: auto, cpu, cuda, cuda:N.", rich_help_panel="Recipe"),
]
SeedOption = Annotated[int | None, typer.Option(metavar="N", help="Short for seed=N.", rich_help_panel="Recipe")]
OutputOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Short for output=FOLDER, the folder of the runs.", rich_help_panel="Recipe")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Make this command's stage again although it is fresh.", rich_help_panel="Running")
]
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Check the artifacts it reads by sha256, not only by size.", rich_help_panel="Running")
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        metavar="N",
        min=1,
        help="Train on N GPUs of this machine; quantize and init use them too.",
        rich_help_panel="GPUs",
    ),
]
SharedGpusOption = Annotated[
    int | None,
    typer.Option("--gpus", metavar="N", min=1, help="Share each block's matrices out to N GPUs.", rich_help_panel="GPUs"),
]
NodesOption = Annotated[
    int, typer.Option(metavar="M", min=1, help="Train on M machines with --gpus each; start it on all.", rich_help_panel="GPUs")
]
NodeRankOption = Annotated[
    int | None,
    typer.Option(metavar="R", min=0, help="This machine's number; by default they agree on it.", rich_help_panel="GPUs"),
]
RendezvousOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Where the machines meet: one of them, the same on all.", rich_help_panel="GPUs"),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume",
        help="Continue unfinished stages behind their last finished block or checkpoint, or start them over.",
        rich_help_panel="Running",
    ),
]


def shorthands(*, device: str | None, seed: int | None, output: Path | None) -> list[str]:
    """Return the overrides that the short options stand for."""
    found: list[str] = []
    if device is not None:
        found.append(f"model.device={json.dumps(device)}")  # a JSON string is a YAML string: nothing in it has a meaning
    if seed is not None:
        found.append(f"seed={seed}")
    if output is not None:
        found.append(f"output={json.dumps(str(output))}")
    return found
