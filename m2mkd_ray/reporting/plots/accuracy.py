"""Figures of what came out: accuracy by network, by suite and by class."""

from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.comparison import comparisons
from m2mkd_ray.reporting.plots.style import Plot, Theme, bare, canvas, mix, subject_colour
from m2mkd_ray.reporting.report import Kind, Report, Subject

_ORDER: tuple[Kind, ...] = ("teacher", "meta", "hybrid", "student", "baseline")
_MOST_CLASSES = 30
_ROW_IN = 0.27


def draw_accuracy(report: Report, theme: Theme) -> Figure:
    """Two bars a network: in domain and, paler, shifted."""
    subjects = [subject for subject in report.of_kind(*_ORDER) if subject.results]
    has_shift = any(suite.shifted for suite in report.suites)
    heights = _rows(subjects)
    figure = canvas(1.3 + max(heights) * (0.43 if has_shift else 0.3))
    axes = figure.subplots()
    bar = 0.39 if has_shift else 0.62
    for y, subject in zip(heights, subjects):
        first = subject is subjects[0]
        colour = subject_colour(report, theme, subject.name)
        pale = mix(colour, theme.paper, 0.55)
        top, bottom = (y - bar / 2, y + bar / 2) if has_shift else (y, y)
        _bar(axes, theme, top, subject.accuracy(shifted=False), bar, colour, "in domain" if first else "")
        _bar(axes, theme, bottom, subject.accuracy(shifted=True), bar, pale, _shift_name(report) if first else "")
    axes.set_yticks(heights, [subject.title for subject in subjects], fontsize=10)
    for label, subject in zip(axes.get_yticklabels(), subjects):
        label.set_color(theme.ink)
        label.set_fontweight("bold" if subject.kind == "student" else "normal")
    bare(axes)
    axes.set_ylim(max(heights) + 0.6, -0.75)
    _percent_axis(axes, 0, 1.0)
    chance = 1 / report.data.num_classes
    axes.axvline(chance, color=theme.muted, linewidth=1, linestyle=(0, (3, 3)))
    axes.text(
        chance, 1.0, f" chance, {units.percent(chance)}", transform=axes.get_xaxis_transform(), va="bottom", ha="left",
        fontsize=8.5, color=theme.muted,
    )  # fmt: skip
    figure.set_label(
        "Bar chart of top-1 accuracy. "
        + "; ".join(
            subject.title
            + "".join(
                f", {where} {units.percent(score)}"
                for where, score in (
                    ("in domain", subject.accuracy(shifted=False)),
                    ("shifted", subject.accuracy(shifted=True)),
                )
                if score is not None
            )
            for subject in subjects
        )
        + f". Chance is {units.percent(chance)}."
    )
    return figure


def draw_suites(report: Report, theme: Theme) -> Figure:
    """Student and first baseline on each suite, as two dots on a line."""
    student, pure = _both(report)
    rows = [
        _Row(suite.title, b.top1, a.top1)
        for suite in report.suites
        if (a := student.result(suite.suite)) and (b := pure.result(suite.suite))
    ]
    return _dumbbells(report, theme, rows, "Top-1 accuracy by suite")


def draw_classes(report: Report, theme: Theme) -> Figure:
    """Student and first baseline on each class of the suite in domain; the extremes if there are too many."""
    student, pure = _both(report)
    of_student, of_pure = _per_class(student), _per_class(pure)
    rows = sorted(
        (_Row(name, of_pure[name], top1) for name, top1 in of_student.items() if name in of_pure),
        key=lambda row: (row.before - row.after, row.name),
    )
    if len(rows) > _MOST_CLASSES:
        rows = rows[: _MOST_CLASSES // 2] + rows[-_MOST_CLASSES // 2 :]
    return _dumbbells(report, theme, rows, "Accuracy by class")


@dataclass(frozen=True)
class _Row:
    name: str
    before: float
    """Of the baseline."""
    after: float
    """Of the student."""


def _dumbbells(report: Report, theme: Theme, rows: list[_Row], what: str) -> Figure:
    student, pure = _both(report)
    figure = canvas(0.85 + _ROW_IN * len(rows))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        ahead = row.after >= row.before
        line = mix(theme.m2mkd if ahead else theme.pure, theme.paper, 0.6)
        axes.plot([row.before, row.after], [y, y], color=line, linewidth=3, zorder=1)
        axes.scatter([row.before], [y], s=46, color=theme.pure, zorder=2)
        axes.scatter([row.after], [y], s=46, color=theme.m2mkd, zorder=3)
        axes.text(
            1.01, y, units.points(row.after - row.before), transform=axes.get_yaxis_transform(), va="center",
            fontsize=9.5, color=theme.m2mkd if ahead else theme.pure,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    for label in axes.get_yticklabels():
        label.set_color(theme.ink)
    bare(axes)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    values = [value for row in rows for value in (row.before, row.after)]
    low, high = max(0.0, min(values) - 0.04), min(1.0, max(values) + 0.04)
    _percent_axis(axes, low, high)
    axes.text(1.01, 1.0, "points", transform=axes.transAxes, va="bottom", ha="left", fontsize=8.5, color=theme.muted)
    axes.legend(
        handles=[Line2D([], [], marker="o", linestyle="", color=colour, label=subject.title)
                 for subject, colour in ((student, theme.m2mkd), (pure, theme.pure))],
        loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=2, frameon=False, labelcolor="linecolor", fontsize=10,
        handletextpad=0.1, columnspacing=1.2, borderpad=0.2,
    )  # fmt: skip
    figure.set_label(
        f"{what}, {pure.title} then {student.title}. "
        + "; ".join(f"{row.name} {units.percent(row.before)}, {units.percent(row.after)}" for row in rows)
    )
    return figure


def _rows(subjects: list[Subject]) -> list[float]:
    """Heights of the rows: one apart, and a gap between kinds."""
    heights = [0.0]
    for before, after in pairwise(subjects):
        heights.append(heights[-1] + (1.0 if before.kind == after.kind else 1.35))
    return heights


def _bar(axes: Axes, theme: Theme, y: float, score: float | None, height: float, colour: str, name: str) -> None:
    if score is None:
        return
    axes.barh(y, score, height=height, color=colour)
    axes.text(
        score + 0.008, y, f"{100 * score:.1f}" + (f"  {name}" if name else ""), va="center", ha="left", fontsize=9,
        color=theme.ink,
    )  # fmt: skip


def _percent_axis(axes: Axes, low: float, high: float) -> None:
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axes.grid(axis="x")
    axes.set_xlabel("top-1 accuracy, %")


def _shift_name(report: Report) -> str:
    shifted = [suite.title for suite in report.suites if suite.shifted]
    return f"shifted ({shifted[0]})" if len(shifted) == 1 else f"shifted (mean of {len(shifted)} suites)"


def _both(report: Report) -> tuple[Subject, Subject]:
    first = comparisons(report)[0]
    return first.student, first.baseline


def _per_class(subject: Subject) -> dict[str, float]:
    return next((result.per_class for result in subject.results if not result.shifted), {})


def _common_suites(report: Report) -> int:
    if not comparisons(report):
        return 0
    student, pure = _both(report)
    return sum(pure.result(result.suite) is not None for result in student.results)


def _has_classes(report: Report) -> bool:
    if not comparisons(report):
        return False
    student, pure = _both(report)
    return len(_per_class(student).keys() & _per_class(pure).keys()) > 1


ACCURACY = Plot(
    draw=draw_accuracy,
    applies=lambda report: any(subject.results for subject in report.subjects),
    section="Results",
    title="Accuracy of every network",
    reading="The full bar is the top-1 accuracy on images like those trained on, the pale bar on shifted ones. "
    "A hybrid is the frozen meta model with one student module in the place of its own: it shows how well that "
    "module was distilled, before the student is assembled and fine-tuned.",
)
SUITES = Plot(
    draw=draw_suites,
    applies=lambda report: _common_suites(report) > 2,
    section="Results",
    title="Suite by suite",
    reading="Each line joins the two networks on one suite; the number at the right is how many points the student "
    "is ahead. A line in the student's colour is a gain, one in the control's colour a loss.",
)
CLASSES = Plot(
    draw=draw_classes,
    applies=_has_classes,
    section="Results",
    title="Class by class",
    reading="As above, for the classes of the suite in domain, largest gain first. "
    f"With more than {_MOST_CLASSES} classes only both ends of the list are drawn.",
)
