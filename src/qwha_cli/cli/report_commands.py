"""The commands that look: `report` writes a run's report, `doctor` says whether this machine can run qwha."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from qwha_cli.cli.boundary import guarded
from qwha_cli.cli.options import DebugOption, JsonOption
from qwha_cli.cli.output import print_json
from qwha_cli.errors import UsageError

PANEL = "Looking"


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command("report", epilog="Example: qwha report runs/smollm2-135m-2bit", rich_help_panel=PANEL)(report)
    app.command("doctor", epilog="Example: qwha doctor --json", rich_help_panel=PANEL)(doctor)


@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its name under ./runs.")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write report.md and report.html of a run."""
    from qwha_cli.cli.console import stderr_console
    from qwha_cli.recipe.load import display_name

    folder = next((place for place in (run, Path("runs") / run) if place.is_dir()), None)
    if folder is None:
        raise UsageError("no such run", where=str(run), remedy="give a run's folder, e.g. runs/smollm2-135m-2bit")
    from qwha_cli.report.render import write_report

    written = write_report(folder)
    for path in (written.markdown, written.html):
        stderr_console().print(Text(f"wrote {display_name(path)}"), soft_wrap=True)
    if as_json:
        print_json({"run": str(folder), "markdown": str(written.markdown), "html": str(written.html)})


@guarded
def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Check Python, packages, devices, disk, memory and offline state; exit 1 if something required is broken."""
    from qwha_cli.cli.console import stderr_console
    from qwha_cli.cli.doctor import examine

    checks = examine()
    styles = {"ok": "green", "warning": "yellow", "broken": "bold red"}
    console = stderr_console()
    for check in checks:
        parts = Text.assemble((f"{check.state:<8}", styles[check.state]), f"{check.name:<20}", check.found)
        console.print(parts + Text(f"  ({check.remedy})" if check.remedy else "", style="dim"), soft_wrap=True)
    healthy = all(check.state != "broken" for check in checks)
    if as_json:
        fields = ("name", "state", "found", "remedy")
        print_json({"healthy": healthy, "checks": [{f: getattr(check, f) for f in fields} for check in checks]})
    raise typer.Exit(0 if healthy else 1)
