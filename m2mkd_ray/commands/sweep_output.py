"""How sweeps look in a terminal: lines while one runs, its plan, its trials."""

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from m2mkd_ray.commands.output import Column, print_table

if TYPE_CHECKING:
    from m2mkd_ray.execution import Event, Stage
    from m2mkd_ray.sweeps.expect import Expected
    from m2mkd_ray.sweeps.results import SweepResults, TrialRecord
    from m2mkd_ray.sweeps.sweep import Sweep

_SHOWN = 40
"""Points of a dry run that are shown; the rest is counted."""


class SweepLines:
    """Writes lines to stderr: a shared stage starts or ends, a stage is tried again, a trial changes."""

    def __init__(self, shared: "Iterable[Stage]") -> None:
        self._shared = {stage.address for stage in shared}
        self._states: dict[str, str] = {}

    def __call__(self, event: "Event") -> None:
        """Take an event of the executor in."""
        from m2mkd_ray.execution import StageEnded, StageFailed, StageRetried, StageReused, StageStarted, StageWaits
        from m2mkd_ray.reporting.units import duration

        is_shared = event.stage.address in self._shared
        match event:
            case StageReused() if is_shared:
                _say(event.stage.address, "found in the store")
            case StageStarted(from_step=step) if is_shared:
                _say(event.stage.address, "started" + (f", from step {step}" if step else ""))
            case StageEnded(seconds=seconds) if is_shared:
                _say(event.stage.address, f"complete in {duration(seconds)}")
            case StageRetried(kind=kind, attempt=attempt):
                _say(event.stage.address, f"{kind} in attempt {attempt}, to be tried again")
            case StageWaits(reason=reason):
                _say(event.stage.address, f"waits: no node has {reason}")
            case StageFailed(message=message):
                _say(event.stage.address, f"failed: {message.partition(chr(10))[0]}")

    def changed(self, results: "SweepResults") -> None:
        """Take newer results in."""
        numbers = results.numbers
        for trial in results.trials:
            before = self._states.get(trial.name)
            self._states[trial.name] = trial.state
            if trial.state not in ("waiting", before):
                _say(f"trial {numbers[trial.name]}", f"{state_words(trial)}: {point_words(trial.point)}")


def _say(who: str, what: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')}  {who}  {what}", err=True)


def state_words(trial: "TrialRecord") -> str:
    """How far a trial is, in words."""
    if trial.value is None:
        return f"{trial.state}{f' ({trial.why})' if trial.why else ''}"
    return f"{trial.state} with {trial.value:.4g} at {trial.epochs:g} epochs"


def point_words(point: Mapping[str, Any]) -> str:
    """A point in words."""
    from m2mkd_ray.reporting.sweep_page import point_words

    return point_words(point)


def print_expected(sweep: "Sweep", expected: "Expected") -> None:
    """A sweep's plan: its points, its stages, and what they cost together and separately."""
    from m2mkd_ray.reporting.sweep import value_word
    from m2mkd_ray.reporting.units import count, percent, quantity

    typer.echo(f"{sweep.title}: {sweep.name}-{sweep.key}\n")
    if expected.points is None:
        typer.echo(f"{expected.num_trials} points, which the searcher {sweep.searcher.kind} proposes as it goes.")
    else:
        shown = expected.points[:_SHOWN]
        columns = [Column("trial", True), *(Column(path, True) for path in sweep.space)]
        cells = [[value_word(p[path]) if path in p else "–" for path in sweep.space] for p in shown]
        print_table(columns, [[str(at), *row] for at, row in enumerate(cells)])
        if len(shown) < len(expected.points):
            typer.echo(f"… and {len(expected.points) - len(shown)} more")
    seeds = f"{len(sweep.seeds)} seed{'s' * (len(sweep.seeds) > 1)}"
    typer.echo(f"\n{expected.num_trials} trials of {seeds}, of at most {expected.epochs:g} epochs each.")
    if expected.points is not None:
        complete = len(expected.trained) - len(expected.to_train)
        done = f", of which {complete} are complete" if complete else ""
        typer.echo(f"{len(expected.trained)} trainings that trials decide{done}, in {len(expected.cohorts)} cohorts.")
    typer.echo(f"{len(expected.shared)} stages that trials share, of which {len(expected.to_make)} are to be made.")
    if expected.together is not None and expected.alone is not None and expected.share is not None:
        print_table(
            [Column("the pairs cost at most"), Column("together", True), Column("separately", True)],
            [
                ["computation", quantity(expected.together.flops, "FLOP"), quantity(expected.alone.flops, "FLOP")],
                ["teacher, images", count(expected.together.teacher_calls), count(expected.alone.teacher_calls)],
                ["decodes, images", count(expected.together.decodes), count(expected.alone.decodes)],
            ],
        )
        typer.echo(f"That is {percent(expected.share, 0)} of the computation of separate trials.")


def expected_json(sweep: "Sweep", expected: "Expected") -> dict[str, Any]:
    """A sweep's plan as JSON values."""
    from dataclasses import asdict

    return {
        "sweep": sweep.name,
        "key": sweep.key,
        "points": None if expected.points is None else [dict(point) for point in expected.points],
        "trials": expected.num_trials,
        "epochs": expected.epochs,
        "seeds": list(sweep.seeds),
        "shared": [stage.address for stage in expected.shared],
        "to_make": [stage.address for stage in expected.to_make],
        "trained": [stage.address for stage in expected.trained] if expected.points is not None else None,
        "to_train": [stage.address for stage in expected.to_train] if expected.points is not None else None,
        "cohorts": list(expected.cohorts),
        "together": asdict(expected.together) if expected.together else None,
        "alone": asdict(expected.alone) if expected.alone else None,
        "share": expected.share,
    }


def results_json(results: "SweepResults") -> dict[str, Any]:
    """Results as JSON values, with the best trial's name."""
    best = results.best
    return {**results.model_dump(mode="json"), "key": results.sweep.key, "best": best.name if best else None}


def print_trials(results: "SweepResults") -> None:
    """A row a trial, the best first."""
    from m2mkd_ray.reporting.sweep import value_word

    sweep, numbers = results.sweep, results.numbers
    several = len(sweep.seeds) > 1
    columns = [Column("trial", True), Column("state"), *(Column(path, True) for path in sweep.space)]
    columns += [
        Column("epochs", True),
        Column(sweep.measured, True),
        *([Column("over seeds", True)] if several else []),
    ]
    ranked = results.ranked
    rows = []
    for trial in [*ranked, *(trial for trial in results.trials if trial not in ranked)]:
        values = [value_word(trial.point[path]) if path in trial.point else "–" for path in sweep.space]
        seeds = sorted(trial.by_seed.values())
        over = [f"{seeds[0]:.4f} to {seeds[-1]:.4f}" if len(seeds) > 1 else ""] if several else []
        value = "" if trial.value is None else f"{trial.value:.4f}"
        rows.append([str(numbers[trial.name]), trial.state, *values, f"{trial.epochs:g}", value, *over])
    print_table(columns, rows)
