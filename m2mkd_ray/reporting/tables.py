"""The report's tables, and the same numbers as JSON and as plain text.

A table is text that is ready to be shown. To add one, write a function and give it
a line in `TABLES`; a table without rows is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from m2mkd_ray.reporting import units
from m2mkd_ray.reporting.comparison import Comparison, comparisons
from m2mkd_ray.reporting.costs import costs
from m2mkd_ray.reporting.counters import PARTS, CounterRow, joined
from m2mkd_ray.reporting.report import Report, Subject, SuiteResult

_KINDS: Mapping[str, str] = {
    "teacher": "teacher",
    "meta": "meta model",
    "hybrid": "meta model with one student module",
    "student": "modular student",
    "baseline": "control",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns."""

    title: str
    section: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric_from: int = 1
    """Columns from this one on are numbers and stand at the right."""
    strong: frozenset[int] = frozenset()
    """Rows that the report is about."""


def accuracy(report: Report) -> Table:
    """One row a network: its scores in domain and its mean over the shifted suites."""
    subjects = report.of_kind("teacher", "meta", "hybrid", "student", "baseline")
    has_shift = any(suite.shifted for suite in report.suites)
    columns = ("network", "what it is", "top-1", "top-5", "NLL", "ECE")
    return Table(
        title="Accuracy",
        section="Results",
        columns=columns + (("shifted top-1",) if has_shift else ()) + ("parameters", "active"),
        rows=tuple(_accuracy_row(subject, has_shift) for subject in subjects if subject.results),
        numeric_from=2,
        strong=frozenset(i for i, subject in enumerate(s for s in subjects if s.results) if subject.kind == "student"),
    )


def suites(report: Report) -> Table:
    """One row a suite, one column a network; hybrids are left out, they would be too many."""
    subjects = [s for s in report.of_kind("student", "baseline", "teacher", "meta") if s.results]
    several = len(report.suites) > 1
    return Table(
        title="Top-1 by suite",
        section="Results",
        columns=("suite", "images", *(subject.title for subject in subjects)),
        rows=tuple(
            (
                suite.title,
                f"{suite.num_images:,}",
                *(units.percent(r.top1) if (r := subject.result(suite.suite)) else "" for subject in subjects),
            )
            for suite in (report.suites if several and subjects else ())
        ),
    )


def gains(report: Report) -> Table:
    """One row a baseline: how far the student is ahead, and how much sooner."""
    student = report.student.title if report.student else ""
    owners = (f"{student} epochs", "control epochs", f"{student} start", "control start")
    return Table(
        title="The student against each control",
        section="Results",
        columns=("control", "gain in domain", "gain shifted", *owners, "level after"),
        rows=tuple(_gain_row(comparison) for comparison in comparisons(report)),
    )


def stages(report: Report) -> Table:
    """One row a stage: time, throughput, attempts."""
    return Table(
        title="Times and parameter counts",
        section="The run",
        columns=("stage", "recipe", "time", "images/s", "trained parameters", "attempts", "reused"),
        rows=tuple(
            (
                row.stage,
                row.recipe,
                units.duration(row.seconds),
                _or_blank(row.images_per_s, lambda value: f"{value:,.0f}"),
                _or_blank(row.parameters, units.count),
                str(row.attempts),
                "yes" if row.reused else "",
            )
            for row in report.stages
        ),
        numeric_from=2,
    )


def held(report: Report) -> Table:
    """One row a node group: what was held of it, and what was lost."""
    return Table(
        title="What it cost",
        section="The run",
        columns=("node group", "GPU-hours", "on spot", "CPU-hours", "on spot", "attempts lost", "steps done again"),
        rows=tuple(
            (
                cost.group,
                *(f"{hours:.2f}" for hours in (cost.gpu_hours, cost.spot_gpu_hours)),
                *(f"{hours:.2f}" for hours in (cost.cpu_hours, cost.spot_cpu_hours)),
                str(cost.lost_attempts),
                f"{cost.lost_steps:,}",
            )
            for cost in costs(report.spans)
        ),
    )


def times(report: Report) -> Table:
    """One row a training: where its time went."""
    return time_table(report.counters)


def time_table(rows: Sequence[CounterRow]) -> Table:
    """Where the time of trainings went; what is known of none of them has no column."""
    cells = {
        "worker shared by": [joined(row.cohort) for row in rows],
        "images/s": [_or_blank(row.images_per_s, units.rate) for row in rows],
        **{name: [_share(row, name) for row in rows] for name in ("data wait", *PARTS.values(), "rest")},
    }
    return _of_trainings("Where the time in training went", rows, cells)


def counts(report: Report) -> Table:
    """One row a training: what it counted."""
    return count_table(report.counters)


def count_table(rows: Sequence[CounterRow]) -> Table:
    """What trainings counted; what none of them counted has no column."""
    cells = {
        "images decoded": [_or_blank(row.decodes, units.count) for row in rows],
        "batches made alone": [_or_blank(row.own_batches, units.count) for row in rows],
        "teacher calls": [_or_blank(row.teacher_calls, units.count) for row in rows],
        "cache hits": [_or_blank(row.hit_rate, _whole_percent) for row in rows],
        "cache size": [_or_blank(row.cache_bytes, lambda value: units.memory(value / 1e9)) for row in rows],
        "cache KL, nats": [_or_blank(row.cache_kl_mean, lambda value: f"{value:.1e}") for row in rows],
        "FLOP": [_or_blank(row.flops, lambda value: units.quantity(value, "")) for row in rows],
        "FLOP/s": [_or_blank(row.flops_per_s, lambda value: units.quantity(value, "")) for row in rows],
        "MFU": [_or_blank(row.mfu, _whole_percent) for row in rows],
        "peak memory": [_or_blank(row.peak_memory_gb, units.memory) for row in rows],
    }
    return _of_trainings("What trainings counted", rows, cells)


def _of_trainings(title: str, rows: Sequence[CounterRow], cells: Mapping[str, Sequence[str]]) -> Table:
    """Columns and rows that have anything to say, and the recipe where there are several."""
    kept = [place for place, _ in enumerate(rows) if any(column[place] for column in cells.values())]
    rows = [rows[place] for place in kept]
    shown = {name: [column[place] for place in kept] for name, column in cells.items() if any(column)}
    several = len({row.recipe for row in rows}) > 1
    names = {"stage": [row.stage for row in rows]} | ({"recipe": [row.recipe for row in rows]} if several else {})
    columns = names | shown
    return Table(
        title=title,
        section="The run",
        columns=tuple(columns),
        rows=tuple(zip(*columns.values())) if shown else (),
        numeric_from=len(names) + ("worker shared by" in shown),
    )


def data(report: Report) -> Table:
    """The images: where from, how many, under which licence."""
    card = report.data
    facts = {
        "data set": card.title,
        "licence": card.licence,
        "source": card.source,
        "classes": f"{card.num_classes:,}",
        **{f"images, {split}": f"{rows:,}" for split, rows in card.rows.items()},
        "fingerprint": card.fingerprint,
    }
    rows = tuple((what, value) for what, value in facts.items() if value)
    return Table("Data", "Provenance", ("", ""), rows, numeric_from=2)


def versions(report: Report) -> Table:
    """What it ran with."""
    return Table("Versions", "Provenance", ("", ""), tuple(report.versions.items()), numeric_from=2)


TABLES: Mapping[str, Callable[[Report], Table]] = {
    "accuracy": accuracy,
    "gains": gains,
    "suites": suites,
    "stages": stages,
    "held": held,
    "times": times,
    "counts": counts,
    "data": data,
    "versions": versions,
}


def summary(report: Report) -> dict[str, Any]:
    """The report's numbers as JSON values, without curves, spans and images.

    Accuracies are fractions, gains are percentage points (student minus baseline), times are seconds.
    What was not measured is null.
    """
    starts, ends = [span.start for span in report.spans], [span.end for span in report.spans]
    return {
        "title": report.title,
        "created": report.created,
        "seed": report.seed,
        "data": report.data.model_dump(mode="json"),
        "accuracy": {subject.name: _scores(subject) for subject in report.subjects},
        "gains": {comparison.baseline.name: _gain(comparison) for comparison in comparisons(report)},
        "parameters": {
            subject.name: {"all": subject.num_parameters, "active": subject.num_active_parameters}
            for subject in report.subjects
        },
        "stages": [row.model_dump(mode="json") for row in report.stages],
        "counters": [row.numbers for row in report.counters],
        "time": {
            "stages_s": sum(row.seconds for row in report.stages),
            "first_start": min(starts, default=None),
            "last_end": max(ends, default=None),
            "workers": len({(span.node, span.worker) for span in report.spans}),
            "nodes": len({span.node for span in report.spans}),
        },
        "costs": [asdict(cost) for cost in costs(report.spans)],
        "notes": list(report.notes),
    }


def text_table(report: Report) -> str:
    """Accuracies and gains as plain text, for a terminal."""
    shown = [table for table in (accuracy(report), gains(report)) if table.rows]
    return "\n\n".join(plain(table) for table in shown)


def plain(table: Table) -> str:
    """A table as lines of text: columns two spaces apart, numbers at the right."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]

    def line_of(cells: tuple[str, ...]) -> str:
        aligned = [
            cell.rjust(width) if i >= table.numeric_from else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        ]
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line_of(table.columns), rule, *map(line_of, table.rows)])


def _accuracy_row(subject: Subject, has_shift: bool) -> tuple[str, ...]:
    in_domain = next((result for result in subject.results if not result.shifted), None)
    shifted = subject.accuracy(shifted=True)
    return (
        subject.title,
        _KINDS[subject.kind] + (", matched compute" if subject.compute_matched else ""),
        *(_in_domain_cells(in_domain) if in_domain else ("",) * 4),
        *((_or_blank(shifted, units.percent),) if has_shift else ()),
        _or_blank(subject.num_parameters, units.count),
        _or_blank(subject.num_active_parameters, units.count),
    )


def _in_domain_cells(result: SuiteResult) -> tuple[str, ...]:
    return (
        units.percent(result.top1),
        _or_blank(result.top5, units.percent),
        _or_blank(result.nll, lambda value: f"{value:.3f}"),
        _or_blank(result.ece, lambda value: f"{value:.3f}"),
    )


def _gain_row(comparison: Comparison) -> tuple[str, ...]:
    matched = ", matched compute" if comparison.baseline.compute_matched else ""
    error = comparison.in_domain_error
    return (
        comparison.baseline.title + matched,
        _or_blank(comparison.in_domain, units.points) + (f" ± {100 * error:.1f}" if error is not None else ""),
        _or_blank(comparison.shifted, units.points),
        _or_blank(comparison.student_epochs, units.epochs),
        _or_blank(comparison.baseline_epochs, units.epochs),
        _or_blank(comparison.student_start, units.percent),
        _or_blank(comparison.baseline_start, units.percent),
        _or_blank(comparison.epochs_to_match, units.epochs),
    )


def _scores(subject: Subject) -> dict[str, Any]:
    return {
        "title": subject.title,
        "kind": subject.kind,
        "recipe": subject.recipe,
        "compute_matched": subject.compute_matched,
        "in_domain": subject.accuracy(shifted=False),
        "shifted": subject.accuracy(shifted=True),
        "suites": {
            result.suite: {
                "shifted": result.shifted,
                "num_images": result.num_images,
                "top1": result.top1,
                "top5": result.top5,
                "nll": result.nll,
                "ece": result.ece,
            }
            for result in subject.results
        },
    }


def _gain(comparison: Comparison) -> dict[str, Any]:
    return {
        "student": comparison.student.name,
        "compute_matched": comparison.baseline.compute_matched,
        "in_domain_points": _or_none(comparison.in_domain),
        "in_domain_points_standard_error": _or_none(comparison.in_domain_error),
        "shifted_points": _or_none(comparison.shifted),
        "student_epochs": comparison.student_epochs,
        "baseline_epochs": comparison.baseline_epochs,
        "student_start": comparison.student_start,
        "baseline_start": comparison.baseline_start,
        "epochs_to_match": comparison.epochs_to_match,
    }


def _share(row: CounterRow, name: str) -> str:
    return _or_blank(row.shares.get(name), _whole_percent)


def _whole_percent(fraction: float) -> str:
    return units.percent(fraction, 0)


def _or_none(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _or_blank(value: float | None, write: Callable[[float], str]) -> str:
    return "" if value is None else write(value)
