"""`qwha`: the command line's root. Commands live beside it, one file a subject; errors end in boundary.py."""

from __future__ import annotations

from typing import Annotated

import typer

from qwha_cli import __version__
from qwha_cli.cli import recipe_commands, report_commands, stage_commands
from qwha_cli.cli.output import print_text

EPILOG = "Exit codes: 0 ok, 1 failed or a gate said no, 2 usage or recipe error, 130 interrupted with the state saved."

app = typer.Typer(
    name="qwha",
    help="Fine-tune 2-, 3- and 4-bit language models with Walsh-Hadamard adapters. Start with: qwha run smollm2-135m-2bit",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # boundary.py speaks to people; locals in tracebacks could show tokens
    context_settings={"help_option_names": ["-h", "--help"]},
)
stage_commands.register(app)
recipe_commands.register(app)
report_commands.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_text(f"qwha {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Hold the options of `qwha` itself."""


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    app(prog_name="qwha")
