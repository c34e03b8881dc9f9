"""The page of a sweep: one HTML file that needs nothing else, its figures as PNG files, its numbers as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.layout import draw, html, sections
from m2mkd_ray.reporting.plots.style import Plot
from m2mkd_ray.reporting.plots.sweep import IMPORTANCE, PARALLEL, RESPONSES
from m2mkd_ray.reporting.plots.sweep_trials import RUNGS, SAVINGS, TRIALS
from m2mkd_ray.reporting.sweep import SweepReport, value_word
from m2mkd_ray.reporting.sweep_tables import SWEEP_TABLES

SWEEP_FIGURES: Mapping[str, Plot[SweepReport]] = {
    "parallel": PARALLEL,
    "responses": RESPONSES,
    "importance": IMPORTANCE,
    "rungs": RUNGS,
    "trials": TRIALS,
    "savings": SAVINGS,
}
"""By the name of their file, in the order of the page."""


@dataclass(frozen=True)
class _Score:
    """One of the big numbers."""

    title: str
    number: str
    words: str
    remark: str = ""


def render_sweep(report: SweepReport, folder: Path) -> Path:
    """Write `report.html`, `report.json` and `figures/*.png` into a folder, which is made if need be; gives the page.

    From `report.json`, `SweepReport.model_validate` makes the same report again.
    """
    figures = draw(SWEEP_FIGURES, report, folder)
    (folder / "report.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    page = folder / "report.html"
    page.write_text(
        html(
            "sweep.html.jinja",
            report=report,
            lead=lead(report),
            scores=_scores(report),
            sections=sections(figures, [build(report) for build in SWEEP_TABLES.values()]),
            notes=notes(report),
        ),
        encoding="utf-8",
    )
    return page


def point_words(point: Mapping[str, object]) -> str:
    """A point in words: "temperature 3.1, alpha 0.7"."""
    words = [f"{path} = {value_word(value)}" for path, value in point.items()]  # type: ignore[arg-type]  # plain
    return ", ".join(words)


def lead(report: SweepReport) -> str:
    """What was done and found, in a sentence or two."""
    states = [trial.state for trial in report.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    what = f"{len(report.parameters)} setting{'s' * (len(report.parameters) > 1)}"
    seeds = f"{len(report.seeds)} seeds" if len(report.seeds) > 1 else f"seed {report.seeds[0]}"
    sentence = f"{len(report.trials)} trials ({counts}) of {what} of {report.recipe}, each with {seeds}"
    best = report.best
    if best is None or best.value is None:
        return sentence + "; none has a value yet."
    return f"{sentence}. Best is trial {best.name} with {report.said(best.value)}: {point_words(best.point)}."


def notes(report: SweepReport) -> tuple[str, ...]:
    """What limits the numbers, as far as the report itself shows it, then the report's own notes."""
    found = []
    if report.state == "running":
        found.append("The sweep is not over: numbers may still change.")
    if report.why:
        found.append(f"It ended early: {report.why}.")
    compared = [trial for trial in report.ranked if trial.state == "complete"]
    if len(compared) > 1:
        found.append(
            f"The best of {len(compared)} trials looks better than it is, as it was chosen by the same numbers. "
            f"Train it and what it is compared with on fresh seeds before you claim a gain."
        )
    if len(report.seeds) == 1:
        found.append("Every point has a single seed: differences may be noise, whose size is not known here.")
    elif report.noise is not None:
        found.append(
            f"Seeds of one point differ by {_difference(report, report.noise)} (standard deviation); differences "
            f"between points of less than about twice that over √{len(report.seeds)} may be noise."
        )
    if any(trial.state == "stopped" for trial in report.trials):
        found.append("Values of stopped trials are those of fewer epochs, and are ranked behind all complete ones.")
    return (*found, *report.notes)


def _scores(report: SweepReport) -> list[_Score]:
    scores = []
    best = report.best
    if best is not None and best.value is not None:
        spread = list(best.by_seed.values())
        remark = f"{report.said(min(spread))} to {report.said(max(spread))} over seeds" if len(spread) > 1 else ""
        scores.append(_Score(f"Best {report.metric}", report.said(best.value), point_words(best.point), remark))
        worst = [trial for trial in report.ranked if trial.state == "complete"][-1:]
        if worst and worst[0].value is not None and worst[0].name != best.name:
            gap = abs(best.value - worst[0].value)
            words = f"trial {worst[0].name}, with {point_words(worst[0].point)}"
            scores.append(_Score("Ahead of the worst complete trial by", _difference(report, gap), words))
    flops = next((saving for saving in report.savings if saving.unit == "FLOP"), None)
    if flops is not None:
        words = (
            f"{flops.what}: {units.quantity(flops.spent, 'FLOP')} instead of {units.quantity(flops.otherwise, 'FLOP')}"
        )
        scores.append(_Score("Cost, by sharing", units.percent(flops.share, 0), words, "of separate trials'"))
    return scores


def _difference(report: SweepReport, size: float) -> str:
    return f"{100 * size:.1f} points" if report.is_share else f"{size:.3g}"
