"""How every figure looks: two themes with the same meaning of colours, and the few things all figures share.

The palette follows Okabe and Ito's colour-blind-safe set (https://jfly.uni-koeln.de/color/), darkened or
lightened until text in each colour reads well on its paper. m2mKD is blue and pure is orange everywhere.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.typing import RcKeyType

from m2mkd_ray.reporting.report import Report

WIDTH_IN = 10.0
"""Width of every figure in inches: 1000 CSS pixels at 100 dots an inch."""
DPI = 200
"""Twice the pixels of the page, for sharp text on dense screens."""


@dataclass(frozen=True)
class Theme:
    """The colours of one scheme, by what they stand for."""

    paper: str
    ink: str
    muted: str
    """Axes, units, remarks."""
    rule: str
    """Grid lines and other hairlines."""
    m2mkd: str
    pure: str
    teacher: str
    meta: str
    hybrid: str
    others: tuple[str, ...]
    """Baselines after the first."""
    chores: tuple[str, ...]
    """Stages of the timeline that train nothing."""
    experts: tuple[str, ...]
    less: str
    """An expert with less than its share; `more` is one with more."""
    more: str

    @property
    def rc(self) -> dict[RcKeyType, Any]:
        """matplotlib's settings, where they differ from its defaults."""
        return {
            "text.parse_math": False,  # class names and paths may hold dollar signs
            "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same page on every machine
            "font.size": 10.0,
            "text.color": self.ink,
            "figure.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "axes.edgecolor": self.rule,
            "axes.labelcolor": self.muted,
            "axes.labelsize": 9.5,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": self.rule,
            "grid.linewidth": 0.7,
            "xtick.color": self.rule,
            "ytick.color": self.rule,
            "xtick.labelcolor": self.muted,
            "ytick.labelcolor": self.muted,
            "xtick.labelsize": 9.0,
            "ytick.labelsize": 9.0,
            "lines.linewidth": 2.0,
            "lines.solid_capstyle": "round",
            "hatch.linewidth": 0.8,
        }

    @property
    def load(self) -> LinearSegmentedColormap:
        """From less than an even share, over the paper's tone, to more."""
        return LinearSegmentedColormap.from_list("load", [self.less, mix(self.rule, self.paper, 0.5), self.more])


LIGHT = Theme(
    paper="#ffffff",
    ink="#1b1f24",
    muted="#5c6570",
    rule="#dfe3e8",
    m2mkd="#0b62b0",
    pure="#c8620a",
    teacher="#7b4a9e",
    meta="#1a8a70",
    hybrid="#6f97b8",
    others=("#8a7a00", "#8d8d94", "#a0527a", "#5f6b3a"),
    chores=("#aab2bd", "#c6ccd4", "#8f98a3"),
    experts=("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f"),
    less="#8a4fa3",
    more="#14815f",
)
DARK = Theme(
    paper="#15191e",
    ink="#e8ebef",
    muted="#a3adb8",
    rule="#333b45",
    m2mkd="#5aa9f5",
    pure="#f29a4a",
    teacher="#bd8fe0",
    meta="#4cc4a6",
    hybrid="#84a9c9",
    others=("#d3c04a", "#9a9aa3", "#d48bb0", "#a5b57a"),
    chores=("#5b6673", "#45505c", "#76828f"),
    experts=("#3a9ad9", "#f0b429", "#2cc29a", "#e09cc2", "#86cdf5", "#f07f3c", "#f5ec7a", "#a5a5a5"),
    less="#b57ad0",
    more="#37b58a",
)


Numbers = TypeVar("Numbers")
"""What a figure is drawn from: a `Report`, or a `SweepReport`."""


@dataclass(frozen=True)
class Plot(Generic[Numbers]):
    """A figure of a report."""

    draw: Callable[[Numbers, Theme], Figure]
    """Draws it; the figure's label (`Figure.set_label`) says in words what is seen, for those who cannot."""
    applies: Callable[[Numbers], bool]
    """Whether the report holds what it shows."""
    section: str
    title: str
    reading: str
    """How to read it: a sentence or two."""


def png(plot: Plot[Numbers], report: Numbers, theme: Theme = LIGHT) -> tuple[bytes, str]:
    """A plot as a PNG file and its description; the same bytes for the same report."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(theme.rc)
        figure = plot.draw(report, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue(), str(figure.get_label())


def canvas(height_in: float, width_in: float = WIDTH_IN) -> Figure:
    """An empty figure on an Agg canvas, without pyplot's global state."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width_in, height_in), layout=layout, dpi=100)
    FigureCanvasAgg(figure)
    return figure


def mix(colour: str, other: str, share: float) -> str:
    """`colour` with a share of `other` in it."""
    red, green, blue = ((1 - share) * a + share * b for a, b in zip(to_rgb(colour), to_rgb(other)))
    return to_hex((red, green, blue))


def subject_colour(report: Report, theme: Theme, name: str) -> str:
    """The colour of a subject, or of the curve of the same name, in every figure."""
    baselines = [subject.name for subject in report.of_kind("baseline")]
    baselines += [c.name for c in report.curves if c.kind == "baseline" and c.name not in baselines]
    if name in baselines:
        palette = (theme.pure, *theme.others)
        return palette[min(baselines.index(name), len(palette) - 1)]
    kinds = {curve.name: curve.kind for curve in report.curves}
    kinds.update({subject.name: subject.kind for subject in report.subjects})
    return {"student": theme.m2mkd, "teacher": theme.teacher, "meta": theme.meta, "hybrid": theme.hybrid}[kinds[name]]


def expert_colour(theme: Theme, expert: int, num_experts: int) -> str:
    """A colour for an expert; beyond the palette, evenly spaced hues."""
    if num_experts <= len(theme.experts):
        return theme.experts[expert]
    return to_hex(matplotlib.colormaps["turbo"]((expert + 0.5) / num_experts))


def bare(axes: Axes, *, keep: Sequence[str] = ()) -> None:
    """Take away ticks and all spines but those in `keep`."""
    axes.tick_params(length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved as little as a single pass allows so that labels there are `gap` apart, in the same order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(positions[i], placed[-1] + gap) if placed else positions[i])
    moved = sum(new - positions[i] for new, i in zip(placed, order)) / max(1, len(placed))
    result = [0.0] * len(positions)
    for new, i in zip(placed, order):
        result[i] = new - moved
    return result


def reads_dark_on(colour: str) -> bool:
    """Whether dark text reads better than white on a colour (WCAG 2 relative luminance)."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]
    return luminance > 0.32
