"""`m2mkd sweep`: search over a recipe's settings, and look at what came of it."""

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from m2mkd_ray.commands.log import log_file
from m2mkd_ray.commands.output import Column, print_json, print_table
from m2mkd_ray.commands.run import Address, NumCpus, StallTimeout, WaitTimeout
from m2mkd_ray.commands.session import AsJson, Session, Settings, StoreRoot, Verbose, session
from m2mkd_ray.commands.sweep_output import (
    SweepLines,
    expected_json,
    point_words,
    print_expected,
    print_trials,
    results_json,
)
from m2mkd_ray.errors import ArtifactError, RunError

if TYPE_CHECKING:
    from m2mkd_ray.execution import Stage, Store
    from m2mkd_ray.execution.ray_launcher import RayLauncher
    from m2mkd_ray.recipe import Recipe
    from m2mkd_ray.sweeps.expect import Expected
    from m2mkd_ray.sweeps.results import SweepResults
    from m2mkd_ray.sweeps.sweep import Sweep

logger = logging.getLogger(__name__)

SweepName = Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep (quick), or a YAML file.")]
OfRecipe = Annotated[
    str | None, typer.Option("--recipe", metavar="RECIPE", help="Sweep this recipe instead of the sweep's own.")
]
Trials = Annotated[int | None, typer.Option("--trials", min=1, help="Try so many points instead of the sweep's own.")]


class _RunByDefault(TyperGroup):
    """`m2mkd sweep quick` is `m2mkd sweep run quick`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named, or `run` where a sweep is."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


app = typer.Typer(
    cls=_RunByDefault, no_args_is_help=True, help="Search over a recipe's settings. `m2mkd sweep NAME` runs one."
)


def chosen_sweep(
    name: str, settings: Sequence[str] | None = None, recipe: str | None = None, trials: int | None = None
) -> "Sweep":
    """A sweep by name or from a YAML file, with what is changed on the command line.

    Raises:
        UsageError: there is none, or it does not fit together.
    """
    from m2mkd_ray.recipe import typed
    from m2mkd_ray.sweeps import find_sweep
    from m2mkd_ray.sweeps.sweep import validated

    sweep = find_sweep(name)
    tree = sweep.model_dump(mode="json")
    tree["settings"].update(typed(setting) for setting in settings or ())
    tree["recipe"] = recipe or tree["recipe"]
    tree["budget"]["trials"] = trials or tree["budget"]["trials"]
    return validated(tree, name)


@app.command("run")
def run(
    context: typer.Context,
    sweep: SweepName,
    settings: Settings = None,
    recipe: OfRecipe = None,
    trials: Trials = None,
    store: StoreRoot = "runs",
    address: Address = None,
    num_cpus: NumCpus = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show points and expected cost; run nothing.")] = False,
    stall_timeout: StallTimeout = 1800.0,
    wait_timeout: WaitTimeout = 3600.0,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Try points of a space of settings; the same command goes on. Ends with the table, best.yaml and the report."""
    from m2mkd_ray.sweeps import points
    from m2mkd_ray.sweeps.expect import expect

    now = session(context)
    now.log.say_more(verbose)
    chosen = chosen_sweep(sweep, settings, recipe, trials)
    now.recipe = points.check(chosen)
    opened = now.open_store(store)
    expected = expect(chosen, now.recipe, opened)
    if dry_run:
        print_json(expected_json(chosen, expected)) if as_json else print_expected(chosen, expected)
        return
    from m2mkd_ray import preflight
    from m2mkd_ray.sweeps import tuning

    if (whole := tuning.ended(chosen, opened)) is not None:  # Ray need not be started to find that
        return _print_end(whole, opened, as_json)
    launcher, placed = _launcher(now, chosen, now.recipe, expected, opened, address, num_cpus)
    from m2mkd_ray.execution.event_log import EventLog
    from m2mkd_ray.execution.events import each
    from m2mkd_ray.execution.metrics import ExecutorMetrics

    lines = SweepLines(expected.shared)
    try:
        with EventLog(opened) as log, redirect_stdout(sys.stderr):  # what Ray Tune prints is no result
            results = tuning.run(
                chosen,
                opened,
                launcher,
                recipe=placed,
                on_event=each(lines, log, ExecutorMetrics([*expected.shared, *expected.trained], preflight.holds)),
                on_change=lines.changed,
                stall_timeout_s=stall_timeout or None,
                wait_timeout_s=wait_timeout or None,
            )
    finally:
        launcher.close()
    _print_end(results, opened, as_json)


def _launcher(
    now: Session,
    sweep: "Sweep",
    recipe: "Recipe",
    expected: "Expected",
    store: "Store",
    address: str | None,
    num_cpus: int | None,
) -> "tuple[RayLauncher, Recipe]":
    """Ray, after all checks of what every trial needs, and the recipe as it is placed there."""
    from m2mkd_ray import preflight
    from m2mkd_ray.commands.run import start_ray
    from m2mkd_ray.execution import LocalLauncher, check
    from m2mkd_ray.sweeps.expect import expect

    stages = [*expected.to_make, *expected.to_train]
    checks = [lambda: preflight.problems(recipe)]
    if address is None:
        checks.append(lambda: preflight.capacity_problems(stages, [preflight.this_machine(num_cpus)]))
    check(stages, store, LocalLauncher(), extra=checks)
    for warning in preflight.warnings(recipe):
        logger.warning(warning)
    if (file := log_file(store, f"sweep-{sweep.name}")) is not None:
        now.log.keep(file)

    def of_trials(placed: "Recipe") -> "list[Stage]":
        found = expected if placed is recipe else expect(sweep, placed, store)
        return [*found.to_make, *found.to_train]

    return start_ray(recipe, of_trials, store, address, num_cpus)


def _print_end(results: "SweepResults", store: "Store", as_json: bool) -> None:
    """The table, the best recipe and the report; an error if no trial came to a value."""
    from m2mkd_ray.sweeps.report import write_best, write_report

    best, report = write_best(store, results), write_report(store, results)
    if as_json:
        print_json({**results_json(results), "best_file": best, "report": report})
    else:
        print_trials(results)
        if results.why:
            typer.echo(f"\nThe sweep was ended early: {results.why}.")
        typer.echo(f"\nReport: {report}")
        if best is not None:
            typer.echo(f"Best:   {best} (m2mkd run {best})")
    numbers = results.numbers
    failed = [(numbers[trial.name], trial) for trial in results.trials if trial.state == "failed"]
    if failed or results.state == "failed":
        lines = [f"- trial {at} ({point_words(trial.point)}): {trial.why}" for at, trial in failed]
        reason = f" {results.why}" if results.why else ""
        raise RunError(
            "\n".join(
                [f"{len(failed)} of {len(results.trials)} trials of {results.sweep.name} failed.{reason}", *lines]
            )
            + "\nThe others are kept. Run the same command again when the cause is gone: only the rest will run."
        )


def _found(
    now: Session, name: str, settings: list[str] | None, recipe: str | None, trials: int | None, root: str
) -> "tuple[Store, SweepResults]":
    """The results of a sweep that was started; names those there are if it was not."""
    from m2mkd_ray.sweeps.results import read

    sweep, store = chosen_sweep(name, settings, recipe, trials), now.open_store(root)
    try:
        return store, read(store, sweep)
    except ArtifactError as error:
        others = store.folders.names("sweeps")
        raise ArtifactError(f"{error} This store has: {', '.join(others) or 'no sweep'}.") from error


@app.command("status")
def status(
    context: typer.Context,
    sweep: SweepName,
    settings: Settings = None,
    recipe: OfRecipe = None,
    trials: Trials = None,
    store: StoreRoot = "runs",
    as_json: AsJson = False,
) -> None:
    """Show every trial, the best first; also while another process runs the sweep."""
    _, results = _found(session(context), sweep, settings, recipe, trials, store)
    if as_json:
        print_json(results_json(results))
        return
    print_trials(results)
    states = [trial.state for trial in results.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    why = f" It was ended early: {results.why}." if results.why else ""
    typer.echo(f"\n{results.sweep.name}-{results.sweep.key} is {results.state}: {counts or 'no trial yet'}.{why}")


@app.command("best")
def best(
    context: typer.Context,
    sweep: SweepName,
    settings: Settings = None,
    recipe: OfRecipe = None,
    trials: Trials = None,
    store: StoreRoot = "runs",
    as_json: AsJson = False,
) -> None:
    """Print the recipe of the best trial, which `m2mkd run` takes as a file; with --json, the trial."""
    from m2mkd_ray.sweeps.report import best_yaml

    _, results = _found(session(context), sweep, settings, recipe, trials, store)
    if results.best is None:
        raise ArtifactError(f"No trial of {results.sweep.name} has a value yet; see `m2mkd sweep status {sweep}`.")
    if as_json:
        print_json(results.best.model_dump(mode="json"))
        return
    typer.echo(best_yaml(results).rstrip())


@app.command("report")
def report(
    context: typer.Context,
    sweep: SweepName,
    settings: Settings = None,
    recipe: OfRecipe = None,
    trials: Trials = None,
    store: StoreRoot = "runs",
    as_json: AsJson = False,
) -> None:
    """Draw the report of what there is so far, and print its path, or with --json its numbers."""
    from m2mkd_ray.sweeps.report import report_of, write_report

    opened, results = _found(session(context), sweep, settings, recipe, trials, store)
    if as_json:
        print_json(report_of(opened, results).model_dump(mode="json"))
        return
    typer.echo(write_report(opened, results))


@app.command("list")
def list_sweeps(as_json: AsJson = False) -> None:
    """Show the sweeps that ship."""
    from m2mkd_ray.sweeps import SWEEPS

    sweeps = [make() for make in SWEEPS.values()]
    if as_json:
        print_json([sweep.model_dump(mode="json") for sweep in sweeps])
        return
    columns = [Column("sweep"), Column("of"), Column("level"), Column("trials", True), Column("varies", wraps=True)]
    rows = [[s.name, s.recipe, s.level.kind, str(s.budget.trials), ", ".join(s.space)] for s in sweeps]
    print_table(columns, rows)


@app.command("show")
def show(sweep: SweepName, settings: Settings = None, recipe: OfRecipe = None, trials: Trials = None) -> None:
    """Print a sweep as YAML, to start a file of your own from."""
    from m2mkd_ray.sweeps.sweep import to_yaml

    typer.echo(to_yaml(chosen_sweep(sweep, settings, recipe, trials)).rstrip())
