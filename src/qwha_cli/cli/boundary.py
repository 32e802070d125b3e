"""Where every error of a command ends: a few lines on stderr, one object on stdout with `--json`, and the right exit code.

Expected failures (QwhaError) show cause and remedy. Anything else is a bug of ours and says so. A traceback is shown with
`--debug` only. Errors of the command line itself (unknown option, missing argument) are Typer's and exit with 2. Of several
processes that train together, the one that fails first speaks, and the others leave in silence.
"""

from __future__ import annotations

import errno
import functools
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from qwha_cli.cli.output import print_json
from qwha_cli.errors import Interrupted, QwhaError, RanksError, RecipeError, ResourceError
from qwha_cli.stages.ranks import own_ranks

P = ParamSpec("P")


class UnexpectedError(QwhaError):
    """A bug: an exception that nobody foresaw."""

    code = "bug"


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that its errors end here; it may have the options `debug` and `as_json`."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise  # Typer knows what to do with these
        except (Exception, KeyboardInterrupt) as error:
            if kwargs.get("debug"):
                traceback.print_exc(file=sys.stderr)
            told = explain(error)
            # whoever lost contact with another process lets that one speak
            if not own_ranks().claim_failure(as_object(told), patient=isinstance(told, RanksError)):
                raise typer.Exit(told.exit_code) from error
            report(told, as_json=bool(kwargs.get("as_json")))

    return run


def explain(error: BaseException) -> QwhaError:
    """Return what a person should read about an exception."""
    if isinstance(error, QwhaError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("stopped", remedy="finished stages and the last checkpoint are kept; the same command continues")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError("the disk is full", where=error.filename, remedy="free some space; finished stages are kept")
    if _is_out_of_memory(error):
        first = (str(error).splitlines() or [""])[0]
        return ResourceError(
            f"out of memory: {first}" if first else "out of memory",
            remedy="lower train.batch_size (raise train.accumulation), quantize.calibration.batch_size or eval.batch_size",
        )
    what = "".join(traceback.format_exception_only(error)).strip().splitlines()
    remedy = "this is a bug in qwha, not your fault: run again with --debug and report the traceback"
    return UnexpectedError(what[0] if what else type(error).__name__, remedy=remedy)


def report(error: QwhaError, *, as_json: bool) -> NoReturn:
    """Print an error and leave the command with its exit code."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    label = "interrupted" if error.code == "interrupted" else "error"
    if isinstance(error, RecipeError):
        console.print(Text(f"{label}: {error.message}", style="bold red"))
        lines = error.lines()
    else:
        first, *lines = error.lines()
        console.print(Text.assemble((f"{label}: ", "bold red"), first))
    for line in lines:
        console.print(Text(line if isinstance(error, RecipeError) and not line.startswith("remedy: ") else f"  {line}"))
    if as_json:
        print_json({"error": as_object(error)})
    raise typer.Exit(error.exit_code)


def as_object(error: QwhaError) -> dict[str, object]:
    """Return an error as `{code, exit_code, message, where, remedy, problems}`."""
    problems = error.problems if isinstance(error, RecipeError) else []
    return {
        "code": error.code,
        "exit_code": error.exit_code,
        "message": error.message,
        "where": error.where,
        "remedy": error.remedy,
        "problems": [{"where": p.where, "message": p.message, "hint": p.hint} for p in problems],
    }


def _is_out_of_memory(error: BaseException) -> bool:
    # by name: torch must not be imported here, and if it never was, this is none of its errors
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return isinstance(error, MemoryError) or "torch.OutOfMemoryError" in kinds or "can't allocate memory" in str(error)
