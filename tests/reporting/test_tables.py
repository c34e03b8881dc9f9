"""Gains, starts and speed against numbers worked out by hand."""

import math

import pytest

from m2mkd_ray.reporting import Curve, Report, Subject, SuiteResult, summary, text_table
from m2mkd_ray.reporting.tables import Table, plain


def _subject(name: str, kind: str, **top1: float) -> Subject:
    results = tuple(
        SuiteResult(suite=suite, title=suite, shifted=suite != "test", num_images=400, top1=value)
        for suite, value in top1.items()
    )
    return Subject.model_validate({"name": name, "title": name, "kind": kind, "recipe": name, "results": results})


def _curve(name: str, kind: str, top1: list[float]) -> Curve:
    points = [{"step": 10.0 * epoch, "epoch": float(epoch), "val_top1": value} for epoch, value in enumerate(top1)]
    return Curve.model_validate({"name": name, "title": name, "kind": kind, "recipe": name, "points": points})


@pytest.fixture
def report(minimal_report: Report) -> Report:
    return minimal_report.model_copy(
        update={
            "subjects": (
                _subject("ours", "student", test=0.70, fog=0.50, blur=0.40, ours_only=0.0),
                _subject("pure", "baseline", test=0.60, fog=0.44, blur=0.42),
            ),
            "curves": (
                _curve("ours", "student", [0.2, 0.5, 0.61, 0.68, 0.70]),
                _curve("pure", "baseline", [0.1, 0.3, 0.45, 0.55, 0.60]),
            ),
        }
    )


def test_gains_are_over_the_suites_that_both_have(report: Report) -> None:
    gain = summary(report)["gains"]["pure"]
    assert gain["in_domain_points"] == pytest.approx(10.0)
    assert gain["shifted_points"] == pytest.approx((6.0 - 2.0) / 2)


def test_the_standard_error_is_that_of_two_binomials(report: Report) -> None:
    expected = 100 * math.sqrt(0.7 * 0.3 / 400 + 0.6 * 0.4 / 400)
    assert summary(report)["gains"]["pure"]["in_domain_points_standard_error"] == pytest.approx(expected)


def test_speed_is_the_first_validation_at_the_baselines_end(report: Report) -> None:
    gain = summary(report)["gains"]["pure"]
    assert (gain["student_start"], gain["baseline_start"]) == (0.2, 0.1)
    assert (gain["student_epochs"], gain["baseline_epochs"]) == (4.0, 4.0)
    assert gain["epochs_to_match"] == 2.0


def test_a_student_that_never_catches_up_has_no_speed(report: Report) -> None:
    slow = _curve("ours", "student", [0.2, 0.3, 0.4, 0.5, 0.55])
    behind = report.model_copy(update={"curves": (slow, report.curves[1])})
    assert summary(behind)["gains"]["pure"]["epochs_to_match"] is None


def test_the_summary_adds_up_times_and_counts_workers(full_report: Report) -> None:
    time = summary(full_report)["time"]
    assert time["stages_s"] == pytest.approx(sum(row.seconds for row in full_report.stages))
    assert (time["workers"], time["nodes"]) == (15, 2)
    assert time["last_end"] - time["first_start"] == pytest.approx(9151.0)


def test_without_a_baseline_there_are_no_gains(minimal_report: Report) -> None:
    assert summary(minimal_report)["gains"] == {}


def test_text_tables_align_their_columns() -> None:
    table = Table("t", "s", ("name", "top-1"), (("a", "5.0 %"), ("longer", "50.0 %")))
    assert plain(table).splitlines() == ["name     top-1", "------  ------", "a        5.0 %", "longer  50.0 %"]


def test_the_text_table_has_accuracies_and_gains(report: Report) -> None:
    text = text_table(report)
    assert "70.0 %" in text
    assert "+10.0 ± 3.4" in text
