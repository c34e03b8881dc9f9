"""The figure of the run: who ran which stage, where and when.

Runs are stopped and resumed, and reuse what other runs left, so days may lie between two stages. Time in
which nothing ran is therefore cut out, and the cut is marked. A worker that ran several stages at a time, a
cohort, has a row of as many lanes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.plots.style import Plot, Theme, bare, canvas, mix, reads_dark_on
from m2mkd_ray.reporting.report import Report, Span

_SHORTEST_CUT = 0.03
"""Idle time is cut out from this share of all busy time on."""
_PALE = 0.75
_GAP = 0.38
"""Between the bars of two workers; a bar of a worker that runs one stage at a time and a gap are 1."""
_LANE = 0.56
"""Height of a lane of a worker that ran several stages at a time."""

Worker = tuple[str, str]
"""Node and process."""


def draw_timeline(report: Report, theme: Theme) -> Figure:
    """A row a worker, a bar a stage; a lane each for stages that a worker ran at the same time."""
    spans = sorted(report.spans, key=lambda span: (span.start, span.stage))
    lanes = _lanes(spans)
    rows = _rows(spans, lanes)
    bottom = max(row.top + row.height for row in rows.values())
    busy = _busy(spans)
    figure = canvas(1.15 + 0.34 * (bottom + _GAP))
    axes = figure.subplots()
    starts, ends = _drawn([s.start for s in spans], busy), _drawn([s.end for s in spans], busy)
    at = [rows[_worker(span)].place(lane) for span, lane in zip(spans, lanes)]
    for i, span in enumerate(spans):
        _bar(axes, theme, report, span, at[i], rows[_worker(span)].bar_height, starts[i], ends[i])
    _frame_cohorts(axes, theme, rows.values())
    axes.set_yticks([row.top + row.height / 2 for row in rows.values()], _row_names(rows))
    for label in axes.get_yticklabels():
        label.set_color(theme.ink)
    bare(axes)
    axes.grid(axis="x")
    axes.set_ylim(bottom + 0.29, -0.29)
    total = sum(end - start for start, end in busy)
    axes.set_xlim(0, total or 1.0)
    time_axis(axes, total)
    _mark_cuts(axes, theme, busy)
    _legend(figure, theme, report, spans)
    _name_bars(figure, axes, theme, report, spans, starts, ends, at)
    figure.set_label(
        f"Timeline of {len(spans)} attempts at stages on {len(rows)} workers of "
        f"{len({span.node for span in spans})} nodes, {units.duration(total)} in all. {_cohorts_in_words(rows)}"
        + "; ".join(f"{span.stage} ({span.recipe}) {units.duration(span.end - span.start)}" for span in spans)
    )
    return figure


def _busy(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """Intervals in which something ran, in order; short pauses belong to them."""
    merged: list[tuple[float, float]] = []
    pause = _SHORTEST_CUT * sum(span.end - span.start for span in spans)
    for span in sorted(spans, key=lambda span: span.start):
        if merged and span.start <= merged[-1][1] + pause:
            merged[-1] = (merged[-1][0], max(merged[-1][1], span.end))
        else:
            merged.append((span.start, span.end))
    return merged


def _drawn(times: Sequence[float], busy: Sequence[tuple[float, float]]) -> list[float]:
    """Unix times as seconds of busy time."""
    passed, knots, values = 0.0, [], []
    for start, end in busy:
        knots += [start, end]
        values += [passed, passed + end - start]
        passed += end - start
    return [float(value) for value in np.interp(times, knots, values)]


@dataclass(frozen=True)
class _Row:
    """Where a worker's bars are drawn, from the top."""

    top: float
    num_lanes: int

    @property
    def height(self) -> float:
        """Of all lanes."""
        return 1 - _GAP if self.num_lanes == 1 else _LANE * self.num_lanes

    @property
    def bar_height(self) -> float:
        """Of one bar."""
        return self.height / self.num_lanes - (0.0 if self.num_lanes == 1 else 0.06)

    def place(self, lane: int) -> float:
        """The middle of a lane."""
        return self.top + self.height * (lane + 0.5) / self.num_lanes


def _worker(span: Span) -> Worker:
    return span.node, span.worker


def _lanes(spans: Sequence[Span]) -> list[int]:
    """The lane of each span within its worker's row: the first that is free; spans are in the order of starts."""
    free_from: dict[Worker, list[float]] = {}
    lanes = []
    for span in spans:
        ends = free_from.setdefault(_worker(span), [])
        lane = next((lane for lane, end in enumerate(ends) if end <= span.start), len(ends))
        ends[lane : lane + 1] = [span.end]
        lanes.append(lane)
    return lanes


def _rows(spans: Sequence[Span], lanes: Sequence[int]) -> dict[Worker, _Row]:
    """The row of each worker: by node, and within a node by who began first."""
    nodes = list(dict.fromkeys(span.node for span in spans))
    most: dict[Worker, int] = {}
    for span, lane in zip(spans, lanes):
        most[_worker(span)] = max(most.get(_worker(span), 0), lane + 1)
    rows, top = {}, 0.0
    for worker in sorted(most, key=lambda worker: nodes.index(worker[0])):
        rows[worker] = _Row(top, most[worker])
        top += rows[worker].height + _GAP
    return rows


def _frame_cohorts(axes: Axes, theme: Theme, rows: Iterable[_Row]) -> None:
    """A band behind the lanes of one worker, so that they are seen to belong together."""
    for row in rows:
        if row.num_lanes > 1:
            colour = mix(theme.rule, theme.paper, 0.55)
            axes.axhspan(row.top - 0.08, row.top + row.height + 0.08, color=colour, linewidth=0, zorder=0)


def _cohorts_in_words(rows: Mapping[Worker, _Row]) -> str:
    sizes = [row.num_lanes for row in rows.values() if row.num_lanes > 1]
    return "".join(f"A worker ran {size} stages at a time. " for size in sizes)


def _row_names(rows: Mapping[Worker, _Row]) -> list[str]:
    """The worker, and before it the node if there are several, once for all of its workers."""
    if len({node for node, _ in rows}) == 1:
        return [worker for _, worker in rows]
    seen: set[str] = set()
    names = []
    for node, worker in rows:
        names.append(worker if node in seen else f"{node}   {worker}")
        seen.add(node)
    return names


def _bar(
    axes: Axes, theme: Theme, report: Report, span: Span, at: float, height: float, start: float, end: float
) -> None:
    """Full if this run did it, pale if it was reused, hatched if it was broken off."""
    colour = _colour(theme, report, span)
    axes.barh(
        at, end - start, left=start, height=height, color=_face(theme, report, span), linewidth=1.0,
        edgecolor=colour if span.reused or not span.is_complete else theme.paper,
        hatch=None if span.is_complete else "////",
    )  # fmt: skip


def _face(theme: Theme, report: Report, span: Span) -> str:
    if not span.is_complete:
        return theme.paper
    colour = _colour(theme, report, span)
    return mix(colour, theme.paper, _PALE) if span.reused else colour


def _name_bars(
    figure: Figure,
    axes: Axes,
    theme: Theme,
    report: Report,
    spans: Sequence[Span],
    starts: Sequence[float],
    ends: Sequence[float],
    at: Sequence[float],
) -> None:
    """Names inside the bars where they fit, else behind or before them where the row is free, else not at all."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what was measured stays where it is
    right = axes.get_xlim()[1]
    pad = 4 * right / axes.get_window_extent().width
    for i, span in enumerate(spans):
        text = axes.text(starts[i] + pad, at[i], _name(span, report), va="center_baseline", fontsize=8.5)
        width = text.get_window_extent().width * pad / 4 + 2 * pad
        others = [k for k in range(len(spans)) if at[k] == at[i] and k != i]
        free_until = min((starts[k] for k in others if starts[k] >= ends[i]), default=right)
        free_from = max((ends[k] for k in others if ends[k] <= starts[i]), default=0.0)
        text.set_color(theme.ink)
        if width <= ends[i] - starts[i]:
            face = _face(theme, report, span)
            text.set_color("#1b1f24" if reads_dark_on(face) else "#ffffff")
            if not span.is_complete:
                text.set_bbox({"facecolor": face, "edgecolor": "none", "pad": 0.5})
        elif width <= free_until - ends[i]:
            text.set_x(ends[i] + pad)
        elif width <= starts[i] - free_from:
            text.set_x(starts[i] - pad)
            text.set_horizontalalignment("right")
        else:
            text.remove()


def _name(span: Span, report: Report) -> str:
    several = len({s.recipe for s in report.spans if s.stage == span.stage}) > 1
    return (
        span.stage
        + (f" · {span.recipe}" if several else "")
        + (f" ({span.outcome.lower()})" if not span.is_complete else "")
    )


def _colour(theme: Theme, report: Report, span: Span) -> str:
    """Fine-tuning in the colour of student or pure, the other trainings in that of what they train."""
    kind = span.kind
    if kind == "finetune":
        is_student = any(subject.recipe == span.recipe for subject in report.of_kind("student"))
        return theme.m2mkd if is_student else theme.pure
    trainings = {"teacher": theme.teacher, "incubate": theme.teacher, "meta": theme.meta, "pair": theme.hybrid}
    return trainings.get(kind) or theme.chores[0]


def _legend(figure: Figure, theme: Theme, report: Report, spans: Sequence[Span]) -> None:
    names: dict[str, str] = {}
    for span in spans:
        kind, colour = span.kind, _colour(theme, report, span)
        trained = {
            theme.teacher: "teacher", theme.meta: "meta model", theme.hybrid: "pairs", theme.m2mkd: "fine-tuning",
            theme.pure: "fine-tuning of controls",
        }  # fmt: skip
        names.setdefault(trained.get(colour, "data, assembly, evaluation" if kind else ""), colour)
    handles = [Patch(color=colour, label=name) for name, colour in names.items()]
    if any(span.reused for span in spans):
        handles.append(Patch(facecolor=mix(theme.muted, theme.paper, _PALE), edgecolor=theme.muted, label="reused"))
    if any(not span.is_complete for span in spans):
        handles.append(Patch(facecolor=theme.paper, edgecolor=theme.muted, hatch="////", label="broken off"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9, handlelength=1.1,
        handleheight=0.9, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def time_axis(axes: Axes, total: float) -> None:
    """Label the x axis of so many seconds in the largest unit of which there are two."""
    size, unit = next((s, u) for s, u in ((3600.0, "h"), (60.0, "min"), (1.0, "s")) if total >= 2 * s or s == 1.0)
    step = next((s * size for s in (1, 2, 5, 10, 20, 30, 60, 120) if total / (s * size) <= 12), 240 * size)
    axes.set_xticks(np.arange(0, total + 1e-9, step))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / size:g}")
    axes.set_xlabel(f"time, {unit}")


def _mark_cuts(axes: Axes, theme: Theme, busy: Sequence[tuple[float, float]]) -> None:
    for (_, before), (after, _) in pairwise(busy):
        at = _drawn([after], busy)[0]
        axes.axvline(at, color=mix(theme.muted, theme.paper, 0.2), linewidth=1.2, linestyle=(0, (1, 2)))
        axes.text(
            at, 1.0, f"idle {units.duration(after - before)}", transform=axes.get_xaxis_transform(), ha="center",
            va="bottom", fontsize=8, color=theme.muted,
        )  # fmt: skip


TIMELINE = Plot(
    draw=draw_timeline,
    applies=lambda report: bool(report.spans),
    section="The run",
    title="Who ran what, where and when",
    reading="A row is a worker process, a bar a stage that it ran. Bars above each other ran at the same time; those "
    "on a band shared a worker, as a cohort. "
    "Time in which nothing ran is cut out. Pale bars were found in the store, hatched ones were broken off.",
)
