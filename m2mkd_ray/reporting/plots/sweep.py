"""The figures of what a sweep found: all parameters at once, each alone, and how much each tells."""

from collections.abc import Sequence
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.plots.style import Plot, Theme, bare, canvas, mix
from m2mkd_ray.reporting.sweep import (
    SweepReport,
    SweptParameter,
    TrialRow,
    fit,
    importances,
    scaled,
    value_word,
)

_ABSENT = -0.13
"""Where a line passes the axis of a parameter that has no effect in its trial; the axis goes from 0 to 1."""


def draw_parallel(report: SweepReport, theme: Theme) -> Figure:
    """An axis a parameter and one for the metric; a line a trial, the more blue the better."""
    figure = canvas(4.3)
    axes = figure.subplots()
    trials = list(reversed(report.ranked))  # the best on top
    num_axes = len(report.parameters) + 1
    colours, colour = _scale(report, theme)
    low, high = colour.vmin or 0.0, colour.vmax or 1.0
    for trial in trials:
        assert trial.value is not None
        heights = [_height(parameter, trial) for parameter in report.parameters]
        heights.append(_place(trial.value, low, high))
        is_best = trial is report.best
        axes.plot(
            range(num_axes), heights, color=theme.pure if is_best else colours(colour(trial.value)),
            linewidth=2.8 if is_best else 1.5, zorder=3 if is_best else 2, clip_on=False,
            linestyle="-" if trial.state == "complete" else (0, (3, 2)), solid_joinstyle="round",
        )  # fmt: skip
    for at, parameter in enumerate(report.parameters):
        _ticks(axes, theme, at, _axis_ticks(parameter))
    _ticks(axes, theme, num_axes - 1, [(_place(v, low, high), report.said(v)) for v in np.linspace(low, high, 4)])
    if any(parameter.path not in trial.point for parameter in report.parameters for trial in trials):
        axes.text(-0.02, _ABSENT, "no effect", ha="right", va="center", fontsize=8.5, color=theme.muted, clip_on=False)
        axes.set_ylim(_ABSENT - 0.05, 1.04)
    else:
        axes.set_ylim(-0.05, 1.04)
    bare(axes)
    axes.set_yticks([])
    axes.set_xlim(-0.15, num_axes - 0.7)
    axes.set_xticks(range(num_axes), [*(p.title for p in report.parameters), report.metric_title])
    axes.tick_params(axis="x", labelsize=10, labelcolor=theme.ink, pad=6)
    _legend_of_states(figure, theme, report)
    axes.figure.colorbar(  # the same colours in every figure of a sweep
        ScalarMappable(Normalize(report.shown(low), report.shown(high)), colours),
        ax=axes,
        pad=0.01,
        aspect=32,
        label=report.metric_title,
    ).outline.set_visible(False)
    figure.set_label(
        f"Parallel coordinates of {len(trials)} trials over {_listed([p.path for p in report.parameters])}; "
        + "; ".join(_in_words(report, trial) for trial in report.ranked[:8])
    )
    return figure


def _scale(report: SweepReport, theme: Theme) -> tuple[LinearSegmentedColormap, Normalize]:
    """From pale to blue, the better the bluer; a single value is in the middle."""
    values = [trial.value for trial in report.ranked if trial.value is not None]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.01, high + 0.01
    ends = [mix(theme.rule, theme.muted, 0.35), mix(theme.m2mkd, theme.paper, 0.45), theme.m2mkd]
    ordered = ends if report.mode == "max" else ends[::-1]
    return LinearSegmentedColormap.from_list("better", ordered), Normalize(low, high)


def _place(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low)


def _height(parameter: SweptParameter, trial: TrialRow) -> float:
    """Where a trial crosses a parameter's axis, 0 to 1."""
    if parameter.path not in trial.point:
        return _ABSENT
    value = trial.point[parameter.path]
    if parameter.values is not None:
        return (list(parameter.values).index(value) + 0.5) / len(parameter.values)
    low, high, at = scaled(parameter, [parameter.low or 0.0, parameter.high or 0.0, value])
    return float(_place(at, low, high))


def _axis_ticks(parameter: SweptParameter) -> list[tuple[float, str]]:
    if parameter.values is not None:
        return [((i + 0.5) / len(parameter.values), value_word(value)) for i, value in enumerate(parameter.values)]
    low, high = parameter.low or 0.0, parameter.high or 0.0
    between = np.geomspace(low, high, 4) if parameter.is_log else np.linspace(low, high, 4)
    return [(at, f"{value:.3g}") for at, value in zip(np.linspace(0, 1, 4), between)]


def _ticks(axes: Axes, theme: Theme, at: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([at, at], [0, 1], color=theme.muted, linewidth=1.0, zorder=1)
    for height, text in ticks:
        axes.plot([at - 0.008, at + 0.008], [height] * 2, color=theme.muted, linewidth=1.0, zorder=1)
        axes.text(
            at + 0.02, height, text, fontsize=8.5, color=theme.muted, va="center", zorder=4,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.6, "alpha": 0.75},
        )  # fmt: skip


def draw_responses(report: SweepReport, theme: Theme) -> Figure:
    """A panel a parameter: the metric over its values, with the range over seeds."""
    parameters = report.parameters
    columns = min(3, len(parameters))
    rows = ceil(len(parameters) / columns)
    figure = canvas(3.3 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel, parameter in zip(grid.flat, parameters):
        _response(panel, theme, report, parameter)
    for panel in grid.flat[len(parameters) :]:
        panel.set_visible(False)
    for first in grid[:, 0]:
        first.set_ylabel(report.metric_title)
    _legend_of_states(figure, theme, report)
    figure.set_label(
        f"{report.metric} over each parameter. " + "; ".join(_in_words(report, trial) for trial in report.ranked[:8])
    )
    return figure


def _response(axes: Axes, theme: Theme, report: SweepReport, parameter: SweptParameter) -> None:
    trials = [trial for trial in report.ranked if parameter.path in trial.point]
    places = [_at(parameter, trial) for trial in trials]
    for trial, x in zip(trials, places):
        assert trial.value is not None
        is_complete, colour = trial.state == "complete", theme.pure if trial is report.best else theme.m2mkd
        seeds = [report.shown(value) for value in trial.by_seed.values()]
        if len(seeds) > 1:
            axes.plot([x, x], [min(seeds), max(seeds)], color=mix(colour, theme.paper, 0.35), linewidth=1.6)
        axes.plot(
            x, report.shown(trial.value), "o", markersize=7, markerfacecolor=colour if is_complete else theme.paper,
            markeredgecolor=colour, markeredgewidth=1.4, zorder=4 if trial is report.best else 3,
        )  # fmt: skip
    ended = [(x, trial.value) for x, trial in zip(places, trials) if trial.state == "complete"]
    complete = [(x, report.shown(value)) for x, value in ended if value is not None]
    _trend(axes, theme, parameter, complete)
    if parameter.is_numeric:
        if parameter.is_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: "")
            axes.set_xticks(_log_ticks(parameter))
    else:
        axes.set_xticks(range(len(parameter.values or ())), [value_word(v) for v in parameter.values or ()])
        axes.set_xlim(-0.6, len(parameter.values or ()) - 0.4)
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.set_title(parameter.title, color=theme.ink)


def _at(parameter: SweptParameter, trial: TrialRow) -> float:
    value = trial.point[parameter.path]
    return float(value) if parameter.is_numeric else float(list(parameter.values or ()).index(value))


def _log_ticks(parameter: SweptParameter) -> list[float]:
    if parameter.values is not None:
        return [float(value) for value in parameter.values]
    return [float(f"{value:.1g}") for value in np.geomspace(parameter.low or 1, parameter.high or 1, 4)]


def _trend(axes: Axes, theme: Theme, parameter: SweptParameter, points: Sequence[tuple[float, float]]) -> None:
    """The mean by value of a list; the parabola of a range."""
    if not points:
        return
    x, y = np.array(sorted(points)).T
    if parameter.values is not None:
        means = {at: y[x == at].mean() for at in dict.fromkeys(x.tolist())}
        style = "-" if parameter.is_numeric else "none"
        axes.plot(list(means), list(means.values()), linestyle=style, color=theme.m2mkd, linewidth=1.6, zorder=2)
        if not parameter.is_numeric:
            axes.hlines(
                list(means.values()),
                [a - 0.25 for a in means],
                [a + 0.25 for a in means],
                color=theme.m2mkd,
                linewidth=1.6,
            )
        return
    coefficients = fit(parameter, x.tolist(), y.tolist())
    if coefficients is not None:
        dense = np.geomspace(x[0], x[-1], 80) if parameter.is_log else np.linspace(x[0], x[-1], 80)
        axes.plot(
            dense, np.polyval(coefficients, scaled(parameter, dense.tolist())), linewidth=1.4, zorder=1,
            color=mix(theme.m2mkd, theme.paper, 0.5), linestyle=(0, (4, 3)),
        )  # fmt: skip


def draw_importance(report: SweepReport, theme: Theme) -> Figure:
    """A bar a parameter."""
    found = importances(report)
    titles = {parameter.path: parameter.title for parameter in report.parameters}
    figure = canvas(1.1 + 0.36 * len(found))
    axes = figure.subplots()
    axes.barh(range(len(found)), [one.explained for one in found], height=0.6, color=theme.m2mkd)
    for place, one in enumerate(found):
        axes.annotate(
            f"{units.percent(one.explained, 0)}  of {one.num_trials} trials", (one.explained, place), xytext=(6, 0),
            textcoords="offset points", va="center_baseline", fontsize=8.5, color=theme.muted,
        )  # fmt: skip
    axes.set_yticks(range(len(found)), [titles[one.path] for one in found])
    for label in axes.get_yticklabels():
        label.set_color(theme.ink)
    bare(axes, keep=("left",))
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, 1.12)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axes.set_xlabel("variance of the values that it explains alone, %")
    figure.set_label("; ".join(f"{one.path} explains {units.percent(one.explained, 0)}" for one in found))
    return figure


def _legend_of_states(figure: Figure, theme: Theme, report: SweepReport) -> None:
    handles = [Line2D([], [], color=theme.pure, linewidth=2.8, marker="o", markersize=6, label="best trial")]
    handles.append(Line2D([], [], color=theme.m2mkd, marker="o", markersize=6, label="to its end"))
    if any(trial.state != "complete" for trial in report.ranked):
        handles.append(
            Line2D(
                [],
                [],
                color=theme.m2mkd,
                linestyle=(0, (3, 2)),
                marker="o",
                markersize=6,
                markerfacecolor=theme.paper,
                label="ended early, or under way",
            )
        )
    figure.legend(
        handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9, columnspacing=1.6,
        borderaxespad=0.2,
    )  # fmt: skip


def _in_words(report: SweepReport, trial: TrialRow) -> str:
    point = ", ".join(f"{path} {value_word(value)}" for path, value in trial.point.items())
    value = "no value" if trial.value is None else report.said(trial.value)
    return f"trial {trial.name} ({point}) {trial.state} with {value} after {units.epochs(trial.epochs)} epochs"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


PARALLEL = Plot[SweepReport](
    draw=draw_parallel,
    applies=lambda report: len(report.ranked) > 1,
    section="Parameters",
    title="All parameters at once",
    reading="A line is a trial: it crosses every axis at the trial's value, and the last at what it reached. Blue is "
    "better. Dashed trials were ended early, or are under way, so their value is that of fewer epochs.",
)
RESPONSES = Plot[SweepReport](
    draw=draw_responses,
    applies=lambda report: bool(report.ranked),
    section="Parameters",
    title="Each parameter alone",
    reading="A point is a trial, a bar through it the range over its seeds. Hollow ones were ended early, or are "
    "under way. Lines: the mean of a listed value; of a range, a parabola through the complete trials. What else "
    "differs between trials is not taken out.",
)
IMPORTANCE = Plot[SweepReport](
    draw=draw_importance,
    applies=lambda report: bool(importances(report)),
    section="Parameters",
    title="What each parameter explains",
    reading="Adjusted R² of a fit to this parameter alone (means of listed words, a parabola over numbers), at the "
    "last epoch that all trials reached. Interactions are not seen; with few trials it is a hint.",
)
