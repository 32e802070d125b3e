"""The commands about recipes: `recipes ls|show|cp|keys` and `validate`. They need nothing heavy and change nothing but copies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwha_cli.cli.boundary import guarded
from qwha_cli.cli.options import DebugOption, JsonOption, OverridesArgument, RecipeArgument
from qwha_cli.cli.output import print_json, print_text
from qwha_cli.errors import UsageError
from qwha_cli.recipe.shipped import find, list_shipped

PANEL = "Recipes"
recipes = typer.Typer(help="List, show and copy the recipes that come with qwha.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the recipe commands to an app."""
    app.add_typer(recipes, name="recipes", rich_help_panel=PANEL)
    app.command("validate", epilog="Example: qwha validate my.yaml train.lr=1e-4", rich_help_panel=PANEL)(validate)


@recipes.command("ls", epilog="Example: qwha recipes ls")
@guarded
def list_command(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the shipped recipes."""
    found = list_shipped()
    if as_json:
        print_json({"recipes": [{"name": r.name, "path": str(r.path), "summary": r.summary} for r in found]})
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for recipe in found:
        table.add_row(Text(recipe.name, style="bold"), recipe.summary)
    Console().print(table)


@recipes.command("show", epilog="Example: qwha recipes show llama32-3b-2bit --resolved")
@guarded
def show(
    recipe: RecipeArgument,
    resolved: Annotated[bool, typer.Option("--resolved", help="With everything it extends, and every default.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print a recipe."""
    from qwha_cli.recipe.load import load_recipe

    if as_json:
        print_json({"path": str(find(recipe)), "recipe": load_recipe(recipe).dump()})
    else:
        print_text(load_recipe(recipe).to_yaml() if resolved else find(recipe).read_text(encoding="utf-8"))


@recipes.command("cp", epilog="Example: qwha recipes cp llama32-3b-2bit my.yaml")
@guarded
def copy(
    recipe: RecipeArgument,
    target: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to; the current directory by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Copy a recipe, to change it."""
    source = find(recipe)
    target = target or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists() and not force:
        raise UsageError("there is a file already", where=str(target), remedy="give another name, or --force")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    Console(stderr=True).print(Text(f"wrote {target}; run it with: qwha run {target}"), soft_wrap=True)
    if as_json:
        print_json({"path": str(target), "source": str(source)})


@recipes.command("keys", epilog="Example: qwha recipes keys train")
@guarded
def keys(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Only keys below this one.")] = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List every key that a recipe can have, with type, default and meaning."""
    from qwha_cli.recipe.keys import list_keys

    found = [key for key in list_keys() if key.name == prefix or key.name.startswith(f"{prefix}." if prefix else "")]
    if not found:
        raise UsageError(f"no key {prefix}", remedy="`qwha recipes keys` lists all")
    if as_json:
        print_json({"keys": [{"name": k.name, "type": k.type, "default": k.default, "meaning": k.meaning} for k in found]})
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key", no_wrap=True)
    for title in ("type", "default", "meaning"):
        table.add_column(title)
    for key in found:
        table.add_row(*(Text(part.replace("`", "")) for part in (key.name, key.type, key.default, key.meaning)))
    Console().print(table)


@guarded
def validate(
    recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Check a recipe: every fault at once, with file, line and column."""
    from qwha_cli.recipe.load import display_name, load_recipe

    checked = load_recipe(recipe, overrides or [])
    path = find(recipe)
    Console(stderr=True).print(Text(f"{display_name(path)} is a valid recipe"), soft_wrap=True)
    if as_json:
        print_json({"valid": True, "path": str(path), "recipe": checked.dump()})
