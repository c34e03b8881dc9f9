"""The figure of where each training's time went: waiting, the frozen modules, the teacher, the student."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.counters import PARTS, CounterRow
from m2mkd_ray.reporting.plots.style import Plot, Theme, bare, canvas, mix, reads_dark_on
from m2mkd_ray.reporting.report import Report

_NAMED_FROM = 0.035
"""Share of the time from which on a part has its number in the bar."""
_WAIT, _REST = "data wait", "rest"


def draw_counters(report: Report, theme: Theme) -> Figure:
    """A bar a training, cut into the shares of its time."""
    rows = _known(report)
    figure = canvas(1.0 + 0.34 * len(rows) if len(rows) > 2 else 2.05)
    axes = figure.subplots()
    colours = _colours(theme)
    for place, row in enumerate(rows):
        _bar(axes, theme, place, row, colours)
    axes.set_yticks(range(len(rows)), _names(rows))
    for label in axes.get_yticklabels():
        label.set_color(theme.ink)
    bare(axes)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axes.set_xlabel("share of the time in training, %")
    figure.legend(
        handles=[axes.barh(0, 0, color=colour, label=name) for name, colour in colours.items() if _is_in(rows, name)],
        loc="outside upper left", ncols=len(colours), frameon=False, fontsize=9, handlelength=1.1, handleheight=0.9,
        columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip
    figure.set_label(f"Bars of where the time of {len(rows)} trainings went. " + "; ".join(map(_in_words, rows)))
    return figure


def _known(report: Report) -> list[CounterRow]:
    return [row for row in report.counters if row.shares]


def _is_in(rows: Sequence[CounterRow], name: str) -> bool:
    return any(name in row.shares for row in rows)


def _colours(theme: Theme) -> dict[str, str]:
    """Frozen meta modules in two tones of the meta model's colour; teacher and student have their own."""
    parts = (theme.meta, theme.teacher, theme.m2mkd, mix(theme.meta, theme.paper, 0.55))
    return {_WAIT: theme.others[0], **dict(zip(PARTS.values(), parts)), _REST: mix(theme.rule, theme.paper, 0.25)}


def _names(rows: Sequence[CounterRow]) -> list[str]:
    several = {row.stage for row in rows if sum(other.stage == row.stage for other in rows) > 1}
    return [f"{row.stage} · {row.recipe}" if row.stage in several else row.stage for row in rows]


def _bar(axes: Axes, theme: Theme, place: int, row: CounterRow, colours: dict[str, str]) -> None:
    left = 0.0
    for name, share in row.shares.items():
        axes.barh(place, share, left=left, height=0.66, color=colours[name], edgecolor=theme.paper, linewidth=0.8)
        if share >= _NAMED_FROM:
            ink = "#1b1f24" if reads_dark_on(colours[name]) else "#ffffff"
            text = f"{100 * share:.0f}"
            axes.text(left + share / 2, place, text, ha="center", va="center_baseline", fontsize=8.5, color=ink)
        left += share
    axes.annotate(
        _speed(row), (1.0, place), xytext=(8, 0), textcoords="offset points", va="center_baseline", fontsize=8.5,
        color=theme.muted, annotation_clip=False,
    )  # fmt: skip


def _speed(row: CounterRow) -> str:
    words = [f"{units.rate(row.images_per_s)} images/s"] if row.images_per_s is not None else []
    return ", ".join(words + ([f"MFU {units.percent(row.mfu, 0)}"] if row.mfu is not None else []))


def _in_words(row: CounterRow) -> str:
    shares = ", ".join(f"{name} {units.percent(share, 0)}" for name, share in row.shares.items())
    return f"{row.stage} ({row.recipe}) {shares}"


COUNTERS = Plot(
    draw=draw_counters,
    applies=lambda report: bool(_known(report)),
    section="The run",
    title="Where the time goes",
    reading="A bar is a training; its parts are shares of the time in training. Prefix and suffix are the frozen "
    "modules of the meta model before the pair and after the student. What was not timed by itself is in the rest. "
    "For a stage that shared its worker, so is the time of the others.",
)
