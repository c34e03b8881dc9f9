"""Figures of training: fine-tuning against the baselines, the stages before it, the teacher's part in the gradient."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.comparison import comparisons
from m2mkd_ray.reporting.plots.style import Plot, Theme, canvas, mix, spread, subject_colour
from m2mkd_ray.reporting.report import Curve, Report

_COLUMNS = 6


def draw_finetuning(report: Report, theme: Theme) -> Figure:
    """Validation accuracy and training loss of student and baselines over epochs."""
    curves = _finetuned(report)
    validated = [curve for curve in curves if curve.series("val_top1")[1]]
    figure = canvas(4.4)
    if not validated:
        _loss_panel(report, theme, figure.subplots(), curves, names=True)
        figure.set_label("Training loss over epochs. " + _losses(curves))
        return figure
    left, right = figure.subplots(1, 2, width_ratios=[1.75, 1])
    _accuracy_panel(report, theme, left, validated)
    _loss_panel(report, theme, right, curves, names=False)
    figure.set_label(
        "Validation accuracy and training loss over epochs. "
        + "; ".join(
            f"{curve.title} starts at {units.percent(values[0])} and ends at {units.percent(values[-1])}"
            for curve in validated
            for values in [curve.series("val_top1")[1]]
        )
        + ". "
        + (_match(report) or "").replace("\n", " ")
    )
    return figure


def draw_curves(report: Report, theme: Theme) -> Figure:
    """A column for each training before fine-tuning: its loss and, where measured, its accuracy below."""
    curves = _before_finetuning(report)
    rows = 2 if any(curve.series("val_top1")[1] for curve in curves) else 1
    bands = math.ceil(len(curves) / _COLUMNS)
    columns = min(len(curves), _COLUMNS)
    figure = canvas(bands * (1.75 * rows + 0.25) + 0.2)
    grid = figure.subplots(bands * rows, columns, squeeze=False, sharey=False)
    for axes in grid.flat:
        axes.set_visible(False)
    loss_axes, top1_axes = [], []
    for i, curve in enumerate(curves):
        band, column = divmod(i, _COLUMNS)
        colour = subject_colour(report, theme, curve.name)
        loss_axes.append(_small(grid[band * rows][column], *curve.series("loss"), colour, theme, smooth=True))
        loss_axes[-1].set_title(curve.title, color=theme.ink, fontsize=10, fontweight="bold")
        if column == 0:
            loss_axes[-1].set_ylabel("loss")
        if rows == 2 and curve.series("val_top1")[1]:
            top1_axes.append(_small(grid[band * rows + 1][column], *curve.series("val_top1"), colour, theme))
            _end_label(top1_axes[-1], curve, theme)
        if column == 0 and rows == 2:
            grid[band * rows + 1][column].set_ylabel("top-1, %")
        last = grid[band * rows + rows - 1][column]
        (last if last.get_visible() else loss_axes[-1]).set_xlabel("epoch")
    _share_limits(loss_axes, theme)
    _share_limits(top1_axes, theme)
    for axes in top1_axes:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    figure.set_label("Small charts of the loss over epochs, one a training. " + _losses(curves))
    return figure


def draw_teacher_share(report: Report, theme: Theme) -> Figure:
    """One line a pair: the part of the gradient that comes from the teacher."""
    curves = [curve for curve in report.curves if _has_share(curve)]
    figure = canvas(3.6)
    axes = figure.subplots()
    everything = [value for curve in curves for value in curve.series("teacher_share")[1]]
    is_log = min(everything) > 0 and max(everything) / min(everything) > 30
    if is_log:
        axes.set_yscale("log")
    colours = _shades(theme, len(curves))
    for curve, colour in zip(curves, colours):
        _line(axes, *curve.series("teacher_share", over="step"), colour, theme, smooth=True)
    if not is_log:
        axes.set_ylim(0, 1.15 * max(everything) or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.set_xlabel("step")
    axes.set_ylabel("teacher's share of the gradient, %")
    axes.margins(x=0.01)
    ends = [(curve.title, curve.series("teacher_share")[1][-1]) for curve in curves]
    _margin_labels(axes, [f"{title}  {_share(value)}" for title, value in ends], [v for _, v in ends], colours)
    figure.set_label(
        "Share of the gradient that the teacher term gives, over steps; at the end "
        + "; ".join(f"{title} {_share(value)}" for title, value in ends)
    )
    return figure


def _accuracy_panel(report: Report, theme: Theme, axes: Axes, curves: Sequence[Curve]) -> None:
    colours = [subject_colour(report, theme, curve.name) for curve in curves]
    for curve, colour in zip(curves, colours):
        epochs, values = curve.series("val_top1")
        is_student = curve.kind == "student"
        axes.plot(epochs, values, color=colour, linewidth=2.6 if is_student else 2.0, zorder=4 if is_student else 3)
        axes.scatter(epochs[:1], values[:1], s=44, facecolor=theme.paper, edgecolor=colour, linewidth=1.8, zorder=5)
        axes.scatter(epochs[-1:], values[-1:], s=30, color=colour, zorder=5)
    values = [value for curve in curves for value in curve.series("val_top1")[1]]
    room = (max(values) - min(values)) or 0.1
    axes.set_ylim(max(0.0, min(values) - 0.25 * room) - 0.01, max(values) + 0.08 * room)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axes.grid(axis="y")
    axes.tick_params(length=0)
    longest = max(epoch for curve in curves for epoch in curve.series("val_top1")[0]) or 1.0
    axes.set_xlim(-0.1 * longest, 1.03 * longest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch of end-to-end training")
    axes.set_title("Validation accuracy, %", color=theme.ink)
    finals = [curve.series("val_top1")[1][-1] for curve in curves]
    names = [f"{curve.title}  {100 * final:.1f}" for curve, final in zip(curves, finals)]
    _margin_labels(axes, names, finals, colours)
    _start_labels(axes, curves[:2], colours)
    _mark_match(report, theme, axes)


def _start_labels(axes: Axes, curves: Sequence[Curve], colours: Sequence[str]) -> None:
    starts = [(epochs[0], values[0]) for epochs, values in (curve.series("val_top1") for curve in curves)]
    low, high = axes.get_ylim()
    for (epoch, start), height, colour in zip(starts, spread([y for _, y in starts], 0.05 * (high - low)), colours):
        axes.annotate(
            f"{100 * start:.1f}", (epoch, height), xytext=(-8, 0), textcoords="offset points", ha="right", va="center",
            fontsize=9, color=colour, fontweight="bold",
        )  # fmt: skip


def _mark_match(report: Report, theme: Theme, axes: Axes) -> None:
    """Where the student is level with the first baseline's end, and the sentence that says so."""
    sentence = _match(report)
    if sentence is None:
        return
    first = comparisons(report)[0]
    curve = report.curve(first.baseline.name)
    assert curve is not None  # or there were no sentence
    final = curve.series("val_top1")[1][-1]
    low = axes.get_ylim()[0]
    if first.epochs_to_match is not None:
        axes.plot(
            [first.epochs_to_match, curve.series("val_top1")[0][-1]], [final, final], color=theme.muted, linewidth=1,
            linestyle=(0, (3, 3)), zorder=2,
        )  # fmt: skip
        axes.plot(
            [first.epochs_to_match] * 2, [low, final], color=theme.muted, linewidth=1, linestyle=(0, (3, 3)), zorder=2
        )
        axes.scatter([first.epochs_to_match], [final], s=26, color=theme.ink, zorder=6)
    at = axes.transLimits.transform((first.epochs_to_match or 0.0, low))[0]
    is_right = first.epochs_to_match is not None and at < 0.6
    axes.text(
        at + 0.015 if is_right else 0.985, 0.025, sentence, transform=axes.transAxes, va="bottom",
        ha="left" if is_right else "right", fontsize=9, linespacing=1.35, color=theme.ink, zorder=7,
        bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def _match(report: Report) -> str | None:
    """The student's speed against the first baseline, in words; None: one of them was not validated."""
    first = next(iter(comparisons(report)), None)
    curve = report.curve(first.baseline.name) if first else None
    if first is None or curve is None or first.student_start is None or not curve.series("val_top1")[1]:
        return None
    pure, epochs, values = first.baseline.title, *curve.series("val_top1")
    goal = f"{pure}'s final {units.percent(values[-1])}"
    if first.epochs_to_match is None:
        return f"{first.student.title} does not reach {goal}"
    return (
        f"{first.student.title} reaches {goal}\n"
        f"after {units.epochs(first.epochs_to_match)} epochs ({pure}: {units.epochs(epochs[-1])})"
    )


def _loss_panel(report: Report, theme: Theme, axes: Axes, curves: Sequence[Curve], *, names: bool) -> None:
    colours = [subject_colour(report, theme, curve.name) for curve in curves]
    for curve, colour in zip(curves, colours):
        _line(axes, *curve.series("loss"), colour, theme, smooth=True)
    axes.set_title("Training loss", color=theme.ink)
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("epoch")
    axes.margins(x=0.02)
    if names:
        _margin_labels(axes, [c.title for c in curves], [c.series("loss")[1][-1] for c in curves], colours)


def _small(axes: Axes, xs: list[float], ys: list[float], colour: str, theme: Theme, *, smooth: bool = False) -> Axes:
    axes.set_visible(True)
    _line(axes, xs, ys, colour, theme, smooth=smooth)
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.margins(x=0.03)
    axes.locator_params(nbins=4)
    return axes


def _line(axes: Axes, xs: list[float], ys: list[float], colour: str, theme: Theme, *, smooth: bool) -> None:
    """A line; a long noisy one is drawn pale, under its running mean over a thirtieth of its points."""
    window = len(ys) // 30
    if not smooth or window < 2:
        axes.plot(xs, ys, color=colour, linewidth=1.8)
        return
    kernel = np.ones(window) / window
    axes.plot(xs, ys, color=mix(colour, theme.paper, 0.75), linewidth=0.7, zorder=1)
    axes.plot(
        np.convolve(xs, kernel, "valid"), np.convolve(ys, kernel, "valid"), color=colour, linewidth=1.8, zorder=3
    )


def _end_label(axes: Axes, curve: Curve, theme: Theme) -> None:
    epochs, values = curve.series("val_top1")
    axes.scatter(epochs[-1:], values[-1:], s=14, color=axes.lines[-1].get_color(), zorder=4)
    axes.annotate(
        f"{100 * values[-1]:.1f}", (epochs[-1], values[-1]), xytext=(0, -6), textcoords="offset points", ha="right",
        va="top", fontsize=9, color=theme.ink,
    )  # fmt: skip


def _share_limits(many: Sequence[Axes], theme: Theme) -> None:
    """The same height in all, so that they can be compared."""
    if many:
        low, high = min(axes.get_ylim()[0] for axes in many), max(axes.get_ylim()[1] for axes in many)
        for axes in many:
            axes.set_ylim(low, high)


def _margin_labels(axes: Axes, names: Sequence[str], values: Sequence[float], colours: Sequence[str]) -> None:
    """Names of lines at the right of the axes, at the height of their ends but never over each other."""
    axes.autoscale_view()
    fraction = axes.transAxes.inverted()
    heights = [float(fraction.transform(axes.transData.transform((0.0, value)))[1]) for value in values]
    for name, height, colour in zip(names, spread(heights, 0.068), colours):
        axes.text(
            1.015, height, name, transform=axes.transAxes, va="center", ha="left", fontsize=9.5, color=colour,
            fontweight="bold",
        )  # fmt: skip


def _shades(theme: Theme, number: int) -> list[str]:
    """From the student's colour to the meta model's: pairs first to last."""
    return [mix(theme.m2mkd, theme.meta, i / max(1, number - 1)) for i in range(number)]


def _share(value: float) -> str:
    """A fraction in per cent with two digits that count, since shares span orders of magnitude."""
    digits = ".0f" if value >= 0.1 else ".1f" if value >= 0.01 else ".2g"
    return f"{100 * value:{digits}} %"


def _losses(curves: Sequence[Curve]) -> str:
    """Where each loss starts and ends, in words."""
    return "; ".join(
        f"{curve.title} from {values[0]:.2f} to {values[-1]:.2f}"
        for curve in curves
        for values in [curve.series("loss")[1]]
    )


def _finetuned(report: Report) -> list[Curve]:
    students = [c for c in report.curves if c.kind == "student" and c.series("loss")[1]]
    return students + [c for c in report.curves if c.kind == "baseline" and c.series("loss")[1]]


def _before_finetuning(report: Report) -> list[Curve]:
    kinds = ("teacher", "meta", "hybrid")
    return [c for kind in kinds for c in report.curves if c.kind == kind and c.series("loss")[1]]


def _has_share(curve: Curve) -> bool:
    return bool(curve.series("teacher_share", over="step")[1])


FINETUNING = Plot(
    draw=draw_finetuning,
    applies=lambda report: bool(_finetuned(report)),
    section="Fine-tuning",
    title="Start and speed of fine-tuning",
    reading="Accuracy on held-out images while the whole student is trained end to end. The ring is where a network "
    "starts; the dashed line leads from the control's end back to the epoch at which the student was already as good. "
    "At the right the loss, pale for each step and full for its running mean.",
)
CURVES = Plot(
    draw=draw_curves,
    applies=lambda report: bool(_before_finetuning(report)),
    section="Teacher, meta model and pairs",
    title="Training before fine-tuning",
    reading="One column a training, all on the same scale: the loss above, the accuracy on held-out images below. "
    "A pair's accuracy is that of its hybrid. Losses with and without a teacher term are not comparable.",
)
TEACHER_SHARE = Plot(
    draw=draw_teacher_share,
    applies=lambda report: any(_has_share(curve) for curve in report.curves),
    section="Teacher, meta model and pairs",
    title="How much the teacher says",
    reading="The norm of the teacher term's gradient at the student's logits, as a share of the sum of the norms of "
    "both terms, for each pair as it is distilled. Near zero, a pair is trained by the labels alone, and the teacher "
    "could be left out.",
)
