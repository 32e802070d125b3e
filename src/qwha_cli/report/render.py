"""Write a run's report: report.md and report.html, beside the stages' folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwha_cli.artifacts.store import write_atomically
from qwha_cli.report.collect import collect
from qwha_cli.report.markdown import markdown
from qwha_cli.report.page import page


@dataclass(frozen=True)
class ReportPaths:
    """Where the two reports were written."""

    markdown: Path
    html: Path


def write_report(run: Path) -> ReportPaths:
    """Collect a run and write report.md and report.html into its folder, replacing older ones.

    Args:
        run: `runs/NAME`; stages that are missing are named in the report.

    Raises:
        ArtifactError: The folder holds no run, or a file in it cannot be read.
    """
    report = collect(run)
    paths = ReportPaths(markdown=run / "report.md", html=run / "report.html")
    write_atomically(paths.markdown, markdown(report))
    write_atomically(paths.html, page(report))
    return paths
