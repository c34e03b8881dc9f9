"""The tables of a sweep's report."""

from collections.abc import Callable, Mapping

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.sweep import SweepReport, TrialRow, importances, value_word
from m2mkd_ray.reporting.tables import Table


def trials(report: SweepReport) -> Table:
    """One row a trial, the best first."""
    several = len(report.seeds) > 1
    ordered = [*report.ranked, *(trial for trial in report.trials if trial not in report.ranked)]
    best = report.best
    return Table(
        title="Trials",
        section="Trials",
        columns=(
            "trial", "state", *(parameter.title for parameter in report.parameters), "epochs",
            report.metric, *(("over seeds",) if several else ()), "time",
        ),
        rows=tuple(_trial(report, trial, several) for trial in ordered),
        numeric_from=2,
        strong=frozenset(at for at, trial in enumerate(ordered) if best is not None and trial.name == best.name),
    )  # fmt: skip


def _trial(report: SweepReport, trial: TrialRow, several: bool) -> tuple[str, ...]:
    point = (value_word(trial.point[p.path]) if p.path in trial.point else "–" for p in report.parameters)
    value = "" if trial.value is None else report.said(trial.value)
    ends = [span.end for span in trial.spans]
    time = units.duration(max(ends) - min(span.start for span in trial.spans)) if ends else ""
    state = f"{trial.state}: {trial.why}" if trial.state == "failed" and trial.why else trial.state
    over = (spread_words(report, trial),) if several else ()
    return (trial.name, state, *point, units.epochs(trial.epochs) if trial.history else "", value, *over, time)


def spread_words(report: SweepReport, trial: TrialRow) -> str:
    """The range over seeds, in words; empty with one."""
    values = list(trial.by_seed.values())
    return f"{report.said(min(values))} to {report.said(max(values))}" if len(values) > 1 else ""


def importance(report: SweepReport) -> Table:
    """One row a parameter."""
    titles = {parameter.path: parameter.path for parameter in report.parameters}
    return Table(
        title="What each parameter explains",
        section="Parameters",
        columns=("parameter", "variance explained", "trials"),
        rows=tuple(
            (titles[one.path], units.percent(one.explained, 0), str(one.num_trials)) for one in importances(report)
        ),
    )


def savings(report: SweepReport) -> Table:
    """One row a count of work."""
    return Table(
        title="What sharing and stopping saved",
        section="Cost",
        columns=("work", "because", "spent", "otherwise", "share"),
        rows=tuple(
            (
                one.what,
                one.because,
                _quantity(one.spent, one.unit),
                _quantity(one.otherwise, one.unit),
                units.percent(one.share, 0),
            )
            for one in report.savings
        ),
        numeric_from=2,
    )


def _quantity(number: float, unit: str) -> str:
    return units.quantity(number, unit) if unit == "FLOP" else f"{units.count(number)} {unit}"


SWEEP_TABLES: Mapping[str, Callable[[SweepReport], Table]] = {
    "trials": trials,
    "importance": importance,
    "savings": savings,
}
"""In the order of the page."""
