"""The commands that make something: quantize, init, train, eval, merge, run. Each loads a recipe and runs stages to its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from qwha_cli.artifacts.manifest import read_manifest
from qwha_cli.cli.boundary import guarded
from qwha_cli.cli.launch import Launch, start
from qwha_cli.cli.options import (
    DebugOption,
    DeviceOption,
    ForceOption,
    GpusOption,
    JsonOption,
    NodeRankOption,
    NodesOption,
    OutputOption,
    OverridesArgument,
    RecipeArgument,
    RendezvousOption,
    ResumeOption,
    SeedOption,
    SharedGpusOption,
    VerifyOption,
    shorthands,
)
from qwha_cli.cli.output import print_json
from qwha_cli.cli.quiet import quiet_libraries
from qwha_cli.errors import ArtifactError, UsageError

RESOLVED = "recipe.resolved.yaml"
RUNS = Path("runs")
STAGES = ("quantize", "init", "train", "eval", "merge")
PANEL = "Stages (each runs what it needs first)"
# Name, what it does, an example; `eval` stands apart, since its recipe may be left out.
COMMANDS = {
    "run": ("Run all stages of a recipe and print what each of them did.", "qwha run smollm2-135m-2bit train.steps=30"),
    "quantize": ("Quantize the model's linear layers to 2, 3 or 4 bits.", "qwha quantize recipes/llama32-3b-2bit.yaml"),
    "init": (
        "Place and fit the adapter so that it undoes quantization error.",
        "qwha init recipes/llama32-3b-2bit.yaml adapter.rank=32",
    ),
    "train": ("Fine-tune the adapter; continues where it was stopped.", "qwha train recipes/llama32-3b-2bit.yaml train.lr=1e-4"),
    "merge": ("Write base and adapter as an ordinary model folder.", "qwha merge recipes/llama32-3b-2bit.yaml merge.into=fp16"),
}


def register(app: typer.Typer) -> None:
    """Add the stage commands to an app."""
    _add_training(app, "run")
    _add_calibrated(app, "quantize")
    _add_calibrated(app, "init")
    _add_training(app, "train")
    app.command("eval", help=EVAL_HELP, epilog=f"Example: {EVAL_EXAMPLE}", rich_help_panel=PANEL)(evaluate)
    _add(app, "merge")


def _add(app: typer.Typer, name: str) -> None:
    """Add a command that works on one device."""
    help_text, example = COMMANDS[name]

    @app.command(name, help=help_text, epilog=f"Example: {example}", rich_help_panel=PANEL)
    @guarded
    def command(
        recipe: RecipeArgument,
        overrides: OverridesArgument = None,
        device: DeviceOption = None,
        seed: SeedOption = None,
        output: OutputOption = None,
        force: ForceOption = False,
        resume: ResumeOption = True,
        verify: VerifyOption = False,
        as_json: JsonOption = False,
        debug: DebugOption = False,
    ) -> None:
        changes = [*(overrides or []), *shorthands(device=device, seed=seed, output=output)]
        options = Running(force=force, resume=resume, verify=verify, as_json=as_json, debug=debug)
        execute(recipe, changes, until=name, how=options)

    del command  # Typer holds it


def _add_calibrated(app: typer.Typer, name: str) -> None:
    """Add a command whose stage shares its matrices out to GPUs, all in this process."""
    help_text, example = COMMANDS[name]

    @app.command(name, help=help_text, epilog=f"Example: {example}", rich_help_panel=PANEL)
    @guarded
    def command(
        recipe: RecipeArgument,
        overrides: OverridesArgument = None,
        device: DeviceOption = None,
        seed: SeedOption = None,
        output: OutputOption = None,
        force: ForceOption = False,
        resume: ResumeOption = True,
        verify: VerifyOption = False,
        gpus: SharedGpusOption = None,
        as_json: JsonOption = False,
        debug: DebugOption = False,
    ) -> None:
        changes = [*(overrides or []), *shorthands(device=device, seed=seed, output=output)]
        options = Running(force=force, resume=resume, verify=verify, as_json=as_json, debug=debug, gpus=gpus)
        execute(recipe, changes, until=name, how=options)

    del command  # Typer holds it


def _add_training(app: typer.Typer, name: str) -> None:
    """Add a command whose training takes a process for each GPU."""
    help_text, example = COMMANDS[name]

    @app.command(name, help=help_text, epilog=f"Example: {example}", rich_help_panel=PANEL)
    @guarded
    def command(
        recipe: RecipeArgument,
        overrides: OverridesArgument = None,
        device: DeviceOption = None,
        seed: SeedOption = None,
        output: OutputOption = None,
        force: ForceOption = False,
        resume: ResumeOption = True,
        verify: VerifyOption = False,
        gpus: GpusOption = None,
        nodes: NodesOption = 1,
        node_rank: NodeRankOption = None,
        rendezvous: RendezvousOption = None,
        as_json: JsonOption = False,
        debug: DebugOption = False,
    ) -> None:
        changes = [*(overrides or []), *shorthands(device=device, seed=seed, output=output)]
        launch = Launch(gpus, nodes, node_rank, rendezvous)
        launch.check()
        options = Running(force=force, resume=resume, verify=verify, as_json=as_json, debug=debug, launch=launch)
        execute(recipe, changes, until=None if name == "run" else name, how=options)

    del command  # Typer holds it


EVAL_HELP = "Score the 16-bit, base, initialised, trained and merged model. Without a recipe: the newest run under ./runs."
EVAL_EXAMPLE = "qwha eval --tasks gsm8k,arc_easy --limit 100"


@guarded
def evaluate(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A path or a shipped recipe; else the newest run.")
    ] = None,
    overrides: OverridesArgument = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A[,B]", help="Short for eval.tasks=[A,B]: tasks of lm-eval.", rich_help_panel="Recipe")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Short for eval.limit=N.", rich_help_panel="Recipe")] = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    output: OutputOption = None,
    force: ForceOption = False,
    resume: ResumeOption = True,
    verify: VerifyOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score every state of the model."""
    changes = [*(overrides or []), *shorthands(device=device, seed=seed, output=output)]
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        changes.insert(0, recipe)  # `qwha eval eval.limit=5`: the first word is an override already
        recipe = None
    changes += [f"eval.tasks={json.dumps(tasks.split(','))}"] if tasks is not None else []
    changes += [f"eval.limit={limit}"] if limit is not None else []
    if recipe is None:
        recipe, found = newest_recipe(output or RUNS)
        changes += found
    how = Running(force=force, resume=resume, verify=verify, as_json=as_json, debug=debug)
    execute(recipe, changes, until="eval", how=how)


@dataclass(frozen=True)
class Running:
    """How a command's stages are run and reported.

    Attributes:
        force: Make that stage (or all) again.
        resume: Continue unfinished stages, instead of starting them over.
        verify: Check inputs by sha256.
        as_json: Print the result as one object on stdout.
        debug: Leave the libraries' own messages on.
        gpus: That quantize and init share their matrices out to, in this process.
        launch: Processes that train together.
    """

    force: bool = False
    resume: bool = True
    verify: bool = False
    as_json: bool = False
    debug: bool = False
    gpus: int | None = None
    launch: Launch = field(default_factory=Launch)

    def words(self) -> list[str]:
        """The options as they are typed, for another process of the same command."""
        flags = {
            "--force": self.force,
            "--no-resume": not self.resume,
            "--verify": self.verify,
            "--json": self.as_json,
            "--debug": self.debug,
        }
        return [flag for flag, on in flags.items() if on]


def execute(reference: str, changes: Sequence[str], *, until: str | None, how: Running) -> None:
    """Run a recipe's stages up to `until` (None: all) and print the outcome.

    Args:
        reference: A path or a shipped recipe's name.
        changes: Overrides.
        until: The last stage wanted.
        how: How to run and to report.
    """
    from qwha_cli.cli.console import is_first_rank, watching
    from qwha_cli.cli.tables import results_table
    from qwha_cli.recipe.load import display_name, load_recipe
    from qwha_cli.report.initialisation import initialisation

    recipe = load_recipe(reference, changes)
    with watching(initializer=recipe.init.method) as events:
        say = events.say
        if how.launch.wanted:
            words = [until or "run", reference, *changes, *how.words()]
            raise typer.Exit(start(how.launch, words, recipe=recipe, say=say, debug=how.debug))
        say(f"recipe   {reference}" + (f"  with {' '.join(changes)}" if changes else ""))
        forced = () if not how.force else STAGES if until is None else (until,)
        with contextlib.nullcontext() if how.debug else quiet_libraries():
            from qwha_cli.stages.runner import RunOptions, run_stages  # after the line above: importing torch takes seconds

            options = RunOptions(force=forced, resume=how.resume, deep_verify=how.verify, gpus=how.gpus)
            result = run_stages(recipe, until=until, events=events, options=options)
        events.close()
        records = _initialised_layers(result.stages["init"].path) if "init" in result.stages and is_first_rank() else []
        if until == "init" and records and result.stages["init"].fresh:
            events.initialised(records)  # asked for and already there: what it won is still the answer
        if result.table:
            events.console.print(results_table(result.table, bits=recipe.quantize.bits))
        say(f"run      {display_name(result.run)}  (its settings: {RESOLVED})")
        if until is None and is_first_rank():
            say(f"report   {display_name(_report(result.run, fresh=all(stage.fresh for stage in result.stages.values())))}")
    if how.as_json and is_first_rank():
        won = initialisation(records, method=recipe.init.method)
        print_json(result.to_json() | ({"initialisation": won.to_json()} if won else {}))


def _initialised_layers(folder: Path) -> list[dict[str, object]]:
    """Return the records of 2-init."""
    from qwha_cli.report.collect import read_records

    return read_records(folder / "layers.jsonl")


def _report(run: Path, *, fresh: bool) -> Path:
    """Write a run's report, unless nothing has changed since it was written; return the HTML file."""
    written = run / "report.html"
    if fresh and written.is_file():
        return written
    from qwha_cli.report.render import write_report

    return write_report(run).html


def newest_recipe(runs: Path) -> tuple[str, list[str]]:
    """Find the run whose last stage was published last, and name it on stderr.

    Args:
        runs: The folder of the runs.

    Returns:
        Its resolved recipe, and the override that makes it write there again.

    Raises:
        UsageError: There is no run.
    """
    from qwha_cli.cli.console import stderr_console
    from qwha_cli.recipe.load import display_name

    found = {folder: _published(folder) for folder in sorted(runs.glob("*")) if (folder / RESOLVED).is_file()}
    finished = {folder: created for folder, created in found.items() if created}
    if not finished:
        raise UsageError(
            "no recipe given, and no run with a finished stage", where=str(runs), remedy="name a recipe: qwha eval RECIPE"
        )
    run = max(finished, key=lambda folder: finished[folder])
    stderr_console().print(Text(f"newest run: {display_name(run)}"), soft_wrap=True)
    # the run may have been moved since, or made from another directory
    return str(run / RESOLVED), [f"name={json.dumps(run.name)}", f"output={json.dumps(str(runs))}"]


def _published(run: Path) -> str:
    """Return the UTC time at which a run's last stage was published; empty where none is readable."""
    times = [""]
    for folder in run.glob("[1-5]-*"):
        try:
            manifest = read_manifest(folder)
        except ArtifactError:
            continue  # a damaged stage says nothing of when the others were made
        times += [manifest.created] if manifest else []
    return max(times)
