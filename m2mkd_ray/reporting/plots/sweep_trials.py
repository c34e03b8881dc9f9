"""The figures of how a sweep went: trials by epoch with their rungs, their timeline, what was saved."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.plots.style import Plot, Theme, bare, canvas, mix
from m2mkd_ray.reporting.plots.timeline import time_axis
from m2mkd_ray.reporting.sweep import Saving, SweepReport, TrialRow

_PALE = 0.62


def draw_rungs(report: SweepReport, theme: Theme) -> Figure:
    """The metric by epoch, a line a trial; rungs upright."""
    figure = canvas(3.9)
    axes = figure.subplots()
    longest = max(trial.epochs for trial in report.ranked)
    for rung in report.rungs:
        axes.axvline(rung, color=theme.rule, linewidth=1.4, zorder=0)
        axes.text(
            rung, 1.01, f"rung {units.epochs(rung)}", transform=axes.get_xaxis_transform(), ha="center", va="bottom",
            fontsize=8.5, color=theme.muted,
        )  # fmt: skip
    for trial in reversed(report.ranked):
        epochs, values = np.array(trial.history).T
        is_best = trial is report.best
        colour = theme.pure if is_best else theme.m2mkd
        colour = colour if trial.state == "complete" else mix(colour, theme.paper, _PALE * 0.7)
        shown = [report.shown(value) for value in values]
        axes.plot(
            epochs, shown, color=colour, linewidth=2.6 if is_best else 1.5, marker="o", markersize=3.5,
            zorder=4 if is_best else 2 + (trial.state == "complete"),
        )  # fmt: skip
        if trial.state == "stopped":
            axes.plot(epochs[-1], shown[-1], "x", color=theme.ink, markersize=6.5, markeredgewidth=1.6, zorder=5)
    best = report.best
    if best is not None and best.value is not None:
        axes.annotate(
            f"trial {best.name}: {report.said(best.value)}", (best.epochs, report.shown(best.value)), xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=9, color=theme.pure, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(0, longest * 1.16)
    axes.set_xlabel("epochs")
    axes.set_ylabel(report.metric_title)
    axes.grid(axis="y")
    axes.tick_params(length=0)
    counts = _counts(report)
    figure.set_label(f"{report.metric} by epoch of {len(report.ranked)} trials, of which {counts}.")
    return figure


def _counts(report: SweepReport) -> str:
    states = [trial.state for trial in report.trials]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def draw_trials(report: SweepReport, theme: Theme) -> Figure:
    """A row a trial, a bar a stage of it; a lane a stage where several ran at a time."""
    trials = _begun(report)
    start = min(span.start for trial in trials for span in trial.spans)
    end = max(span.end for trial in trials for span in trial.spans)
    workers = list(dict.fromkeys(span.worker for trial in trials for span in trial.spans))
    figure = canvas(1.2 + 0.3 * len(trials))
    axes = figure.subplots()
    palette = (theme.m2mkd, theme.meta, theme.teacher, *theme.others)
    for row, trial in enumerate(trials):
        height = 0.72 / len(trial.spans)
        for lane, span in enumerate(sorted(trial.spans, key=lambda span: (span.seed, span.stage))):
            colour = palette[workers.index(span.worker) % len(palette)]
            face = colour if trial.state == "complete" else mix(colour, theme.paper, _PALE)
            axes.barh(
                row - 0.36 + height * (lane + 0.5), span.end - span.start, left=span.start - start,
                height=height * 0.88, facecolor=face, edgecolor=colour, linewidth=0.6,
            )  # fmt: skip
        axes.annotate(
            _how(report, trial), (max(span.end for span in trial.spans) - start, row), xytext=(6, 0),
            textcoords="offset points", va="center_baseline", fontsize=8.5, color=theme.muted, annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(trials)), [f"trial {trial.name}" for trial in trials])
    for label, trial in zip(axes.get_yticklabels(), trials):
        label.set_color(theme.pure if report.best is not None and trial.name == report.best.name else theme.ink)
    bare(axes)
    axes.grid(axis="x")
    axes.set_ylim(len(trials) - 0.4, -0.6)
    axes.set_xlim(0, (end - start or 1.0) * 1.2)
    time_axis(axes, end - start or 1.0)
    _legend_of_workers(figure, theme, workers, palette)
    figure.set_label(
        f"Timeline of {len(trials)} trials on {len(workers)} workers, {units.duration(end - start)}: "
        + "; ".join(f"trial {trial.name} {_how(report, trial)}" for trial in trials)
    )
    return figure


def _begun(report: SweepReport) -> list[TrialRow]:
    begun = [trial for trial in report.trials if trial.spans]
    return sorted(begun, key=lambda trial: (min(span.start for span in trial.spans), int(trial.name)))


def _how(report: SweepReport, trial: TrialRow) -> str:
    value = "" if trial.value is None else report.said(trial.value)
    if trial.state == "complete":
        return value
    after = f"{trial.state} at {units.epochs(trial.epochs)}" if trial.history else trial.state
    return f"{after}, {value}" if value else after


def _legend_of_workers(figure: Figure, theme: Theme, workers: Sequence[str], palette: Sequence[str]) -> None:
    handles = [
        Patch(color=palette[at % len(palette)], label=worker) for at, worker in enumerate(workers[: len(palette)])
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(5, len(handles)), frameon=False, fontsize=9,
        handlelength=1.1, handleheight=0.9, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def draw_savings(report: SweepReport, theme: Theme) -> Figure:
    """Two bars a kind of work: what was spent, and what it would have been otherwise."""
    rows = report.savings
    figure = canvas(0.9 + 0.62 * len(rows))
    axes = figure.subplots()
    for place, saving in enumerate(rows):
        axes.barh(place - 0.17, 1.0, height=0.3, color=mix(theme.muted, theme.paper, 0.6))
        axes.barh(place + 0.17, saving.share, height=0.3, color=theme.m2mkd)
        _name(axes, theme, 1.0, place - 0.17, f"{_amount(saving.otherwise, saving)} otherwise")
        _name(axes, theme, saving.share, place + 0.17, _amount(saving.spent, saving))
    axes.set_yticks(range(len(rows)), [f"{saving.what}\n{saving.because}" for saving in rows])
    for label in axes.get_yticklabels():
        label.set_color(theme.ink)
    bare(axes)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 1.35)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axes.set_xlabel("share of what it would have been, %")
    figure.set_label(
        "; ".join(
            f"{saving.what}: {_amount(saving.spent, saving)} instead of {_amount(saving.otherwise, saving)}"
            for saving in rows
        )
    )
    return figure


def _name(axes: Axes, theme: Theme, at: float, place: float, text: str) -> None:
    axes.annotate(
        text, (at, place), xytext=(6, 0), textcoords="offset points", va="center_baseline", fontsize=8.5,
        color=theme.muted, annotation_clip=False,
    )  # fmt: skip


def _amount(number: float, saving: Saving) -> str:
    return units.quantity(number, saving.unit) if saving.unit == "FLOP" else f"{units.count(number)} {saving.unit}"


RUNGS = Plot[SweepReport](
    draw=draw_rungs,
    applies=lambda report: bool(report.ranked) and max(len(trial.history) for trial in report.ranked) > 1,
    section="Trials",
    title="Trials by epoch",
    reading="A line is a trial. At a rung the scheduler lets the better ones go on; a cross is where it stopped one.",
)
TRIALS = Plot[SweepReport](
    draw=draw_trials,
    applies=lambda report: any(trial.spans for trial in report.trials),
    section="Trials",
    title="Which trial ran when, in which worker",
    reading="A row is a trial, a bar a stage of it for one seed, its colour the worker. Bars of one colour at one "
    "time are members of a cohort. Pale ones did not come to their end.",
)
SAVINGS = Plot[SweepReport](
    draw=draw_savings,
    applies=lambda report: bool(report.savings),
    section="Cost",
    title="What sharing and stopping saved",
    reading="Blue is what the sweep took, by the counters of its stages; grey is the same work where nothing is "
    "shared or stopped, from the number of images and the models' sizes.",
)
