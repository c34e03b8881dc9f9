"""The chart of a placement: a row a device, a bar a stage or a cohort. From plain data, before anything ran."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.plots.style import DPI, LIGHT, Theme, bare, canvas, reads_dark_on

_NAMED = 40
"""Rows up to which each is named; of more, every node's first."""


@dataclass(frozen=True)
class Lane:
    """A device, a row of the chart."""

    node: str
    type: str


@dataclass(frozen=True)
class Bar:
    """Something that runs on a device."""

    label: str
    lane: int
    """The row."""
    low: float
    """Where on the device its share begins, 0 to 1."""
    share: float
    """What it has of the device."""
    start_s: float
    end_s: float
    kind: str
    """alone, cohort, fraction or several devices."""


def draw_placement(lanes: Sequence[Lane], bars: Sequence[Bar], bound_s: float, theme: Theme = LIGHT) -> Figure:
    """Draw bars on lanes, and the lower bound as a line.

    Args:
        lanes: the rows, from the top.
        bars: what runs on them.
        bound_s: seconds that no placement can beat.
        theme: colours.
    """
    row = 0.34 if len(lanes) <= _NAMED else max(0.06, 13.0 / len(lanes))
    figure = canvas(1.25 + row * max(1, len(lanes)))
    axes = figure.subplots()
    colours = _colours(theme)
    for bar in bars:
        bottom = bar.lane - 0.4 + 0.8 * bar.low
        axes.barh(
            bottom, bar.end_s - bar.start_s, left=bar.start_s, height=0.8 * bar.share * 0.94, align="edge",
            color=colours[bar.kind], edgecolor=theme.paper, linewidth=0.8 if row > 0.15 else 0.2,
        )  # fmt: skip
    end = max((bar.end_s for bar in bars), default=1.0)
    axes.axvline(bound_s, color=theme.ink, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(0, max(end, bound_s) * 1.01)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    _name_rows(axes, lanes, theme)
    bare(axes)
    axes.grid(axis="x")
    _time_axis(axes, end)
    _legend(figure, theme, bars, bound_s)
    _name_bars(figure, axes, bars, colours, row)
    figure.set_label(
        f"Placement of {len(bars)} bars on {len(lanes)} devices, {units.duration(end)} in all; lower bound "
        f"{units.duration(bound_s)}."
    )
    return figure


def placement_png(lanes: Sequence[Lane], bars: Sequence[Bar], bound_s: float, theme: Theme = LIGHT) -> bytes:
    """The chart as a PNG file; the same bytes for the same placement."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(theme.rc)
        figure = draw_placement(lanes, bars, bound_s, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()


def _colours(theme: Theme) -> dict[str, str]:
    return {
        "alone": theme.hybrid,
        "cohort": theme.m2mkd,
        "several devices": theme.teacher,
        "fraction": theme.meta,
    }


def _name_rows(axes: Axes, lanes: Sequence[Lane], theme: Theme) -> None:
    """Node and type at the node's first device; with many nodes as many names as have room."""
    firsts = [i for i, lane in enumerate(lanes) if i == 0 or lanes[i - 1].node != lane.node]
    shown = firsts[:: -(-len(firsts) // _NAMED)] if len(lanes) > _NAMED else firsts
    axes.set_yticks(shown, [_row_name(lanes[i]) for i in shown])
    for label in axes.get_yticklabels():
        label.set_color(theme.ink)
        if len(lanes) > _NAMED:
            label.set_fontsize(6.5)


def _row_name(lane: Lane) -> str:
    return lane.node if lane.node.startswith(lane.type) else f"{lane.node}  ({lane.type})"


def _time_axis(axes: Axes, end: float) -> None:
    sizes = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
    size, unit = next((s, u) for s, u in sizes if end >= 4 * s or s == 1.0)
    steps = np.array([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500])
    step = float(steps[min(int(np.searchsorted(steps, end / size / 12)), len(steps) - 1)]) * size
    axes.set_xticks(np.arange(0, end + 1e-9, step))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / size:g}")
    axes.set_xlabel(f"time, {unit}")


def _legend(figure: Figure, theme: Theme, bars: Sequence[Bar], bound_s: float) -> None:
    kinds = {bar.kind for bar in bars}
    handles: list[Patch] = [
        Patch(color=colour, label=kind) for kind, colour in _colours(theme).items() if kind in kinds
    ]
    bound = Patch(facecolor="none", edgecolor=theme.ink, linestyle=(0, (4, 3)))
    bound.set_label(f"lower bound {units.duration(bound_s)}")
    figure.legend(
        handles=[*handles, bound], loc="outside upper left", ncols=len(handles) + 1, frameon=False, fontsize=9,
        handlelength=1.1, handleheight=0.9, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def _name_bars(figure: Figure, axes: Axes, bars: Sequence[Bar], colours: dict[str, str], row: float) -> None:
    """Names inside the bars where they fit."""
    if row < 0.15:
        return
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what was measured stays where it is
    per_pixel = axes.get_xlim()[1] / axes.get_window_extent().width
    for bar in bars:
        size = 8.5 if bar.share > 0.7 else 6.0
        if bar.share < 0.4:
            continue
        middle = bar.lane - 0.4 + 0.8 * (bar.low + bar.share / 2 * 0.94)
        dark = reads_dark_on(colours[bar.kind])
        text = axes.text(
            bar.start_s + 4 * per_pixel, middle, bar.label, va="center_baseline", fontsize=size,
            color="#1b1f24" if dark else "#ffffff",
        )  # fmt: skip
        if text.get_window_extent().width + 8 > (bar.end_s - bar.start_s) / per_pixel:
            text.remove()
