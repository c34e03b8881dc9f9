"""Figures of routing: how evenly experts are used, and which patches of an image go where."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.plots.style import Plot, Theme, bare, canvas, expert_colour, reads_dark_on
from m2mkd_ray.reporting.report import ExpertUse, Report, RoutingExample, Subject, decode_image, mean

_MOST_SUITES = 3
_MOST_EXAMPLES = 8
_MOST_NUMBERED = 8
"""Patches a side, and experts, up to which their numbers are printed."""


def draw_load(report: Report, theme: Theme) -> Figure:
    """A heat map of blocks and experts for each subject (rows) and suite (columns), entropy beside each."""
    subjects = _routed(report)
    columns = [_panels(subject) for subject in subjects]
    num_blocks = [len(panels[0][1]) for panels in columns]
    figure = canvas(0.6 + sum(0.62 + 0.3 * blocks for blocks in num_blocks) + 0.35)
    widest = max(len(panels) for panels in columns)
    ratios = [ratio for _ in range(widest) for ratio in (3.2, 1.0)]
    grid = figure.subplots(
        len(subjects), 2 * widest, squeeze=False, width_ratios=ratios, height_ratios=[b + 1.4 for b in num_blocks]
    )
    for axes in grid.flat:
        axes.set_visible(False)
    image = None
    for row, (subject, panels) in enumerate(zip(subjects, columns)):
        for column, (title, uses) in enumerate(panels):
            heat, side = grid[row][2 * column], grid[row][2 * column + 1]
            image = _heat_map(heat, theme, uses, f"{subject.title} · {title}", with_blocks=column == 0)
            _entropy_bars(side, theme, uses)
    assert image is not None  # there is a panel, or the plot did not apply
    bar = figure.colorbar(image, ax=list(grid.flat), location="bottom", shrink=0.42, aspect=38, pad=0.02)
    bar.set_ticks([0, 1, 2], labels=["never used", "even share, 1/E", "twice its share or more"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=theme.muted)
    figure.set_label(
        "Heat maps of the share of tokens that each expert gets. "
        + "; ".join(
            f"{subject.title} on {title}: largest share {units.percent(max(max(u.load) for u in uses.values()))}, "
            f"smallest {units.percent(min(min(u.load) for u in uses.values()))}"
            for subject, panels in zip(subjects, columns)
            for title, uses in panels
        )
    )
    return figure


def draw_routing(report: Report, theme: Theme) -> Figure:
    """A column an image: the image, and below it each block's choice of expert for every patch."""
    examples = _by_image(report)
    num_experts = _num_experts(report)
    blocks = list(dict.fromkeys(example.block for column in examples for example in column))
    side = min(1.55, 8.9 / len(examples))
    figure = canvas((len(blocks) + 1) * (side + 0.06) + 1.0)
    grid = figure.subplots(len(blocks) + 1, len(examples), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, column in enumerate(examples):
        pixels = decode_image(column[0].image)
        grid[0][i].imshow(pixels, cmap="gray", interpolation="nearest")
        right = column[0].label == column[0].predicted
        grid[0][i].set_title(
            _clip(column[0].label) + ("" if right else f"\n→ {_clip(column[0].predicted)}"), loc="center",
            fontsize=9, color=theme.ink, va="bottom", fontweight="normal" if right else "bold",
        )  # fmt: skip
        for example in column:
            _patches(grid[1 + blocks.index(example.block)][i], theme, pixels, example, num_experts)
    for axes, name in zip(grid[:, 0], ["image", *blocks]):
        axes.text(
            -0.08, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=9, color=theme.muted,
            rotation=90,
        )  # fmt: skip

    if num_experts <= 16:
        figure.legend(
            handles=[Patch(color=expert_colour(theme, e, num_experts), label=str(e)) for e in range(num_experts)],
            title="expert", loc="outside lower center", ncols=num_experts, frameon=False, handlelength=1.0,
            handleheight=1.0, columnspacing=1.3, fontsize=9, title_fontsize=9,
        )  # fmt: skip
    figure.set_label(
        f"{len(examples)} images with the expert that each patch prefers in {', '.join(blocks)}. "
        + "; ".join(f"{column[0].label}, taken for {column[0].predicted}" for column in examples)
    )
    return figure


def _heat_map(axes: Axes, theme: Theme, uses: dict[str, ExpertUse], title: str, *, with_blocks: bool) -> AxesImage:
    axes.set_visible(True)
    most = max(len(use.load) for use in uses.values())
    loads = np.full((len(uses), most), np.nan)  # (blocks, E)
    for row, use in enumerate(uses.values()):
        loads[row, : len(use.load)] = use.load
    fair = loads * np.array([[len(use.load)] for use in uses.values()])  # 1 is an even share
    image = axes.imshow(fair, cmap=theme.load, norm=Normalize(0, 2, clip=True), aspect="auto")
    if most <= _MOST_NUMBERED:
        for (row, column), load in np.ndenumerate(loads):
            if not math.isnan(load):
                dark = reads_dark_on(to_hex(theme.load(float(fair[row, column]) / 2)))
                axes.text(
                    column, row, f"{100 * load:.0f}", ha="center", va="center", fontsize=8.5,
                    color="#1b1f24" if dark else "#ffffff",
                )  # fmt: skip
    axes.set_title(title, color=theme.ink, fontsize=9.5)
    axes.set_xticks(range(0, most, max(1, most // 8)))
    axes.set_yticks(range(len(uses)), list(uses) if with_blocks else [""] * len(uses))
    axes.set_xlabel("expert")
    bare(axes)
    return image


def _entropy_bars(axes: Axes, theme: Theme, uses: dict[str, ExpertUse]) -> None:
    """The routers' entropy as a share of the most it can be."""
    axes.set_visible(True)
    shares = [use.entropy / math.log(len(use.load)) if len(use.load) > 1 else 0.0 for use in uses.values()]
    rows = range(len(shares))
    axes.barh(rows, [1.0] * len(shares), height=0.42, color=theme.rule)
    axes.barh(rows, shares, height=0.42, color=theme.muted)
    for row, share in zip(rows, shares):
        axes.text(1.06, row, f"{100 * share:.0f}", va="center", ha="left", fontsize=8, color=theme.muted)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.set_xlim(0, 1.35)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("entropy, %", color=theme.muted, fontsize=8.5)
    bare(axes)


def _patches(axes: Axes, theme: Theme, pixels: np.ndarray, example: RoutingExample, num_experts: int) -> None:
    """The image in grey under its grid of experts."""
    height, width = pixels.shape[:2]
    grey = pixels if pixels.ndim == 2 else pixels[..., :3].mean(-1)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    rows, columns = len(example.grid), len(example.grid[0])
    colours = [[expert_colour(theme, expert, num_experts) for expert in row] for row in example.grid]
    tint = np.array([[[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in row] for row in colours]) / 255
    axes.imshow(tint, extent=(-0.5, width - 0.5, height - 0.5, -0.5), alpha=0.62, interpolation="nearest")
    for i in range(1, rows):
        axes.axhline(i * height / rows - 0.5, color=theme.paper, linewidth=0.8)
    for i in range(1, columns):
        axes.axvline(i * width / columns - 0.5, color=theme.paper, linewidth=0.8)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    if max(rows, columns) <= _MOST_NUMBERED:
        for (row, column), expert in np.ndenumerate(np.array(example.grid)):
            axes.text(
                (column + 0.5) * width / columns - 0.5, (row + 0.5) * height / rows - 0.5, str(expert), ha="center",
                va="center", fontsize=8, color="#ffffff", fontweight="bold",
                path_effects=[withStroke(linewidth=1.8, foreground="#1b1f24")],
            )  # fmt: skip


def _panels(subject: Subject) -> list[tuple[str, dict[str, ExpertUse]]]:
    """Title and use of experts for each suite; many shifted suites become their mean."""
    results = sorted((r for r in subject.results if r.experts), key=lambda result: result.shifted)
    if len(results) <= _MOST_SUITES:
        return [(result.title, result.experts) for result in results]
    shifted = [result.experts for result in results if result.shifted]
    panels = [(result.title, result.experts) for result in results if not result.shifted][: _MOST_SUITES - 1]
    return panels + ([(f"mean of {len(shifted)} shifted suites", _mean_use(shifted))] if shifted else [])


def _mean_use(many: list[dict[str, ExpertUse]]) -> dict[str, ExpertUse]:
    return {
        block: ExpertUse(
            load=tuple(mean(loads) for loads in zip(*(uses[block].load for uses in many))),
            entropy=mean([uses[block].entropy for uses in many]),
        )
        for block in many[0]
        if all(block in uses for uses in many)
    }


def _routed(report: Report) -> list[Subject]:
    """The student and the first baseline, if they have experts."""
    return [s for s in (report.student, report.pure) if s is not None and any(r.experts for r in s.results)]


def _num_experts(report: Report) -> int:
    """Experts of the block that has most; those that no patch of the examples prefers count too."""
    named = [expert for example in report.routing for row in example.grid for expert in row]
    loads = [use.load for subject in report.subjects for r in subject.results for use in r.experts.values()]
    return max([1 + max(named), *map(len, loads)])


def _by_image(report: Report) -> list[list[RoutingExample]]:
    """Examples of the same image together, the first few images."""
    columns: dict[tuple[str, str], list[RoutingExample]] = {}
    for example in report.routing:
        columns.setdefault((example.image, example.label), []).append(example)
    return list(columns.values())[:_MOST_EXAMPLES]


def _clip(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


LOAD = Plot(
    draw=draw_load,
    applies=lambda report: bool(_routed(report)),
    section="Experts",
    title="Load of the experts",
    reading="A row is a block, a column an expert, the number the percentage of assignments it gets; the neutral tone "
    "is an even share. Columns of strong colour are a collapsed router. The bar beside a row is the routers' "
    "entropy in per cent of the most it can be: 100 chooses at random, 0 is always sure.",
)
ROUTING = Plot(
    draw=draw_routing,
    applies=lambda report: bool(report.routing),
    section="Experts",
    title="Where patches go",
    reading="Test images and, below each, the expert that every patch prefers, block by block. A name with an arrow "
    f"was classified wrongly, as what stands behind the arrow. At most {_MOST_EXAMPLES} images are drawn.",
)
