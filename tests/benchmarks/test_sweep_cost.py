"""The measurement of what a sweep costs compares the same trials, and knows what they should count."""

from pathlib import Path

import pytest

from benchmarks.decodes import jpegs
from benchmarks.sweep_cost import SEATS, is_as_predicted, sweep_of
from m2mkd_ray.execution import Store
from m2mkd_ray.sweeps.cost import Cost
from m2mkd_ray.sweeps.expect import expect
from m2mkd_ray.sweeps.points import check


def test_both_ways_are_the_same_trials_and_differ_in_what_is_run_once(tmp_path: Path) -> None:
    jpegs(tmp_path, rows=48)
    sweeps = {way: sweep_of(seats, tmp_path / "data", (), epochs=2, index=2) for way, seats in SEATS.items()}
    plans = {way: expect(sweep, check(sweep), Store(str(tmp_path))) for way, sweep in sweeps.items()}
    together, separately = plans["together"], plans["separately"]
    assert [stage.address for stage in together.trained] == [stage.address for stage in separately.trained]
    assert (together.cohorts, separately.cohorts) == ((8,), (1,) * 8)
    assert together.together is not None
    assert separately.together == separately.alone == together.alone
    assert together.together.teacher_calls * 8 == separately.together.teacher_calls == 8 * 2 * 48
    assert together.together.decodes * 8 == separately.together.decodes == 8 * 48  # once for both epochs
    assert together.share == pytest.approx(together.together.flops / separately.together.flops)


@pytest.mark.parametrize(("off", "expected"), [(0.0, True), (16.0, False)])
def test_a_teacher_that_was_run_once_too_often_is_noticed(off: float, expected: bool, tmp_path: Path) -> None:
    jpegs(tmp_path, rows=48)
    sweep = sweep_of(8, tmp_path / "data", (), epochs=2, index=2)
    plan = expect(sweep, check(sweep), Store(str(tmp_path)))
    assert plan.together is not None
    assert is_as_predicted(plan.together + Cost(teacher_calls=off), plan) == expected
