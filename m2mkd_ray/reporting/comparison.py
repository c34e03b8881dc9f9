"""The student against each baseline: gains, starts and speed, worked out once for page, figures and JSON."""

import math
from dataclasses import dataclass

from m2mkd_ray.reporting.report import Curve, Report, Subject, SuiteResult, mean


@dataclass(frozen=True)
class Comparison:
    """A student and a baseline. Gains are differences of fractions, student minus baseline; None: not measured."""

    student: Subject
    baseline: Subject
    in_domain: float | None
    """Mean gain in top-1 over the suites in domain that both were evaluated on."""
    in_domain_error: float | None
    """Standard error of that gain from the number of test images alone, as if the two were tested on images of
    their own; says nothing about the spread between seeds."""
    shifted: float | None
    """Mean gain over the shifted suites that both were evaluated on."""
    student_epochs: float | None
    baseline_epochs: float | None
    student_start: float | None
    """Accuracy at the first validation."""
    baseline_start: float | None
    epochs_to_match: float | None
    """Epochs after which the student first validates at least as well as the baseline does in the end."""

    @property
    def has_equal_epochs(self) -> bool:
        """Whether both are known to be trained end to end for the same number of epochs."""
        return (
            self.student_epochs is not None
            and self.baseline_epochs is not None
            and math.isclose(self.student_epochs, self.baseline_epochs, rel_tol=1e-3)
        )


def comparisons(report: Report) -> tuple[Comparison, ...]:
    """The report's student against each of its baselines; none if it has no student."""
    student = report.student
    if student is None:
        return ()
    return tuple(compare(report, student, baseline) for baseline in report.of_kind("baseline"))


def compare(report: Report, student: Subject, baseline: Subject) -> Comparison:
    """One student against one baseline."""
    both = [(a, b) for a in student.results for b in baseline.results if a.suite == b.suite]
    in_domain = [(a, b) for a, b in both if not a.shifted]
    of_student, of_baseline = report.curve(student.name), report.curve(baseline.name)
    return Comparison(
        student=student,
        baseline=baseline,
        in_domain=_gain(in_domain),
        in_domain_error=_standard_error(in_domain),
        shifted=_gain([(a, b) for a, b in both if a.shifted]),
        student_epochs=report.epochs(student),
        baseline_epochs=report.epochs(baseline),
        student_start=_start(of_student),
        baseline_start=_start(of_baseline),
        epochs_to_match=epochs_to_match(of_student, of_baseline) if of_student and of_baseline else None,
    )


def epochs_to_match(student: Curve, baseline: Curve) -> float | None:
    """Epoch of the student's first validation that is no worse than the baseline's last; None: never."""
    _, of_baseline = baseline.series("val_top1")
    if not of_baseline:
        return None
    return next((epoch for epoch, top1 in zip(*student.series("val_top1")) if top1 >= of_baseline[-1]), None)


def _gain(pairs: list[tuple[SuiteResult, SuiteResult]]) -> float | None:
    return mean([a.top1 - b.top1 for a, b in pairs]) if pairs else None


def _standard_error(pairs: list[tuple[SuiteResult, SuiteResult]]) -> float | None:
    """Of the mean gain, each top-1 being binomial."""
    if not pairs:
        return None
    variance = sum(r.top1 * (1 - r.top1) / r.num_images for pair in pairs for r in pair)
    return math.sqrt(variance) / len(pairs)


def _start(curve: Curve | None) -> float | None:
    values = curve.series("val_top1")[1] if curve else []
    return values[0] if values else None
