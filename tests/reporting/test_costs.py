"""Costs, by hand: workers that several stages share, retries, spot, and what was lost."""

import pytest

from m2mkd_ray.reporting import Span, cost_line, costs

HOUR = 3600.0


def span(stage: str, worker: str, start_h: float, end_h: float, **more: object) -> Span:
    settings = {"node_group": "incubate", "gpus": 1.0, "cpus": 2.0, **more}
    return Span(stage=stage, recipe="r", worker=worker, node="n", start=start_h * HOUR, end=end_h * HOUR, **settings)


def test_a_cohort_holds_its_worker_once() -> None:
    """Two members from 0 to 1 and to 3, then the same worker again from 5 to 6: four hours."""
    spans = [span("pair-0", "a", 0, 1), span("pair-1", "a", 0, 3), span("pair-2", "a", 5, 6)]
    (cost,) = costs(spans)
    assert cost.gpu_hours == pytest.approx(4)
    assert cost.cpu_hours == pytest.approx(8)


def test_groups_spot_and_lost_work_are_told_apart() -> None:
    spans = [
        span("pair-0", "a", 0, 2, spot=True, outcome="LOST", lost_steps=7),
        span("pair-0", "b", 2, 3, spot=True, outcome="PREEMPTED"),
        span("pair-0", "c", 3, 4),
        span("finetune", "d", 4, 5, node_group="finetune", gpus=8.0),
        span("data", "e", 0, 1, node_group="", gpus=0.0),
    ]
    by_group = {cost.group: cost for cost in costs(spans)}
    assert list(by_group) == ["finetune", "incubate", "no group"]
    pairs = by_group["incubate"]
    assert (pairs.gpu_hours, pairs.spot_gpu_hours) == (pytest.approx(4), pytest.approx(3))
    assert (pairs.lost_attempts, pairs.lost_steps) == (2, 7)
    assert by_group["finetune"].gpu_hours == pytest.approx(8)
    assert cost_line(costs(spans)) == (
        "12.0 GPU-hours (finetune 8, incubate 4), 3 of them on spot, which at a third to a half of the price saved "
        "what 1.5 to 2 cost on demand; work that was lost: 7 steps in 2 attempts."
    )


def test_without_gpus_the_line_counts_cores() -> None:
    line = cost_line(costs([span("pair-0", "a", 0, 0.5, gpus=0.0, lost_steps=1, outcome="LOST")]))
    assert line == "1 CPU-hours (incubate 1), 0 of them on spot; work that was lost: 1 step in 1 attempt."


def test_where_nothing_ran_there_is_no_line() -> None:
    assert cost_line(costs([])) == ""
