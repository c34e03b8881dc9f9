"""The page: one HTML file that needs nothing else, its figures as PNG files, its numbers as JSON.

Figures are inlined twice, for light and dark paper, and the browser takes the one that fits; there
is no script, no web font and no other file, so the page can be mailed, archived and opened offline.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.comparison import Comparison, comparisons
from m2mkd_ray.reporting.layout import Drawn, draw, html, sections
from m2mkd_ray.reporting.plots import FIGURES
from m2mkd_ray.reporting.report import Report, Subject
from m2mkd_ray.reporting.tables import TABLES, summary

_MEASURED = "how many test images there are, not from the spread between seeds"


@dataclass(frozen=True)
class _Score:
    """One of the big numbers: the student against the first baseline."""

    title: str
    student: str
    baseline: str
    difference: str
    student_width: float
    baseline_width: float
    is_gain: bool
    remark: str


def render(report: Report, folder: Path) -> None:
    """Write `report.html`, `report.json` and `figures/*.png` into a folder, which is made if need be.

    `report.json` holds `summary` (see `summary`) and `report`, from which `Report.model_validate` makes
    the same report again.
    """
    figures = draw(FIGURES, report, folder)
    numbers = {"summary": summary(report), "report": report.model_dump(mode="json")}
    (folder / "report.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(_html(report, figures), encoding="utf-8")


def _html(report: Report, figures: list[Drawn]) -> str:
    return html(
        "page.html.jinja",
        report=report,
        lead=lead(report),
        scores=_scores(report),
        sections=sections(figures, [build(report) for build in TABLES.values()]),
        notes=notes(report),
    )


def lead(report: Report) -> str:
    """What was done, in a sentence or two."""
    student, pure = report.student, report.pure
    if student is None:
        return f"{len(report.subjects)} networks were evaluated on {report.data.title}."
    pairs = [curve for curve in report.curves if curve.kind == "hybrid" and curve.recipe == student.recipe]
    modules = len(pairs) or sum(s.kind == "hybrid" and s.recipe == student.recipe for s in report.subjects)
    sentence = f"A modular student{_size(student)} was put together from "
    sentence += f"{modules} modules, each distilled from its own part of a teacher" if modules else "distilled modules"
    teacher = next(iter(report.of_kind("teacher")), None)
    sentence += _size(teacher) if teacher and modules else ""
    epochs = report.epochs(student)
    sentence += f", then trained end to end on {report.data.title}"
    sentence += f" for {units.epochs(epochs)} epochs" if epochs is not None else ""
    if pure is None:
        return sentence + "."
    own = report.epochs(pure)
    same = comparisons(report)[0].has_equal_epochs
    sentence += f". Its control, {pure.title}, is the same student trained from scratch"
    return sentence + (" for as many." if same else f" for {units.epochs(own)} epochs." if own is not None else ".")


def notes(report: Report) -> tuple[str, ...]:
    """What limits the numbers, as far as the report itself shows it, then the report's own notes."""
    found = [f"Every number comes from a single run with seed {report.seed}: the spread between seeds is not known."]
    of_all = comparisons(report)
    if of_all and of_all[0].in_domain_error is not None:
        found.append(f"A “±” is one standard error from {_MEASURED}.")
    matched = [comparison for comparison in of_all if comparison.baseline.compute_matched]
    found += [_on_compute(comparison) for comparison in matched]
    if of_all and not matched:
        found.append(
            "No control with matched compute is among the networks: the student also had the training of its modules, "
            "so a gain at equal epochs of end-to-end training is not a gain at equal cost."
        )
    shifted = sum(suite.shifted for suite in report.suites)
    if report.subjects and not shifted:
        found.append("No shifted suite was evaluated: nothing is known about other distributions.")
    return (*found, *report.notes)


def _on_compute(comparison: Comparison) -> str:
    if comparison.in_domain is None:
        return f"{comparison.baseline.title}, the control with matched compute, was not evaluated in domain."
    ahead = "ahead" if comparison.in_domain >= 0 else "behind"
    return (
        f"Against {comparison.baseline.title}, the control that had as much compute as all stages of the student "
        f"together, the student is {100 * abs(comparison.in_domain):.1f} points {ahead} in domain."
    )


def _scores(report: Report) -> list[_Score]:
    student, pure = report.student, report.pure
    if student is None or pure is None:
        return []
    first = comparisons(report)[0]
    error = first.in_domain_error
    scores = [
        _score(first, "In domain", False, first.in_domain, f"± {100 * error:.1f}" if error is not None else ""),
        _score(first, "Shifted", True, first.shifted, ""),
        _speed(report, first),
    ]
    return [score for score in scores if score is not None]


def _score(first: Comparison, title: str, shifted: bool, gain: float | None, remark: str) -> _Score | None:
    student, baseline = first.student.accuracy(shifted=shifted), first.baseline.accuracy(shifted=shifted)
    if gain is None or student is None or baseline is None:
        return None
    return _Score(
        title=f"{title}, top-1",
        student=units.percent(student),
        baseline=units.percent(baseline),
        difference=f"{units.points(gain)} points",
        student_width=round(100 * student, 2),
        baseline_width=round(100 * baseline, 2),
        is_gain=gain >= 0,
        remark=remark,
    )


def _speed(report: Report, first: Comparison) -> _Score | None:
    """Epochs to the baseline's final accuracy."""
    if first.epochs_to_match is None or not first.baseline_epochs:
        return None
    most = max(first.epochs_to_match, first.baseline_epochs)
    times = first.baseline_epochs / first.epochs_to_match if first.epochs_to_match else None
    return _Score(
        title=f"Epochs to {first.baseline.title}'s final accuracy",
        student=units.epochs(first.epochs_to_match),
        baseline=units.epochs(first.baseline_epochs),
        difference=f"{times:.1f}× sooner" if times else "at the start",
        student_width=round(100 * first.epochs_to_match / most, 2),
        baseline_width=round(100 * first.baseline_epochs / most, 2),
        is_gain=first.epochs_to_match <= first.baseline_epochs,
        remark="",
    )


def _size(subject: Subject) -> str:
    return f" of {units.count(subject.num_parameters)} parameters" if subject.num_parameters else ""
