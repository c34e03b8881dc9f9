"""How many trials a cluster takes, and what they share."""

from pathlib import Path

import pytest
from small_sweeps import small_sweep

from m2mkd_ray.execution import Gathering, Stage, View
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.placement import Occupied, Seat
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.points import base, recipes, targets
from m2mkd_ray.sweeps.tuning import max_concurrent, shared


@pytest.fixture
def pairs(tiny: Path) -> list[Stage]:
    """The pairs of eight trials, which are mates."""
    sweep = small_sweep(tiny)
    recipe = base(sweep)
    made = [targets(sweep, one) for point in drawn(sweep) or () for one in recipes(sweep, point, recipe).values()]
    return [stage for stages in made for stage in stages]


@pytest.mark.parametrize(("cpus", "count", "expected"), [(1, 1, 8), (2, 1, 16), (2, 4, 4), (0, 1, 1), (64, 1, 128)])
def test_as_many_trials_run_as_their_stages_have_seats(
    cpus: int, count: int, expected: int, pairs: list[Stage]
) -> None:
    assert max_concurrent(pairs[:count], [Node("node", {"CPU": cpus})]) == expected


def test_what_every_trial_reads_is_shared_and_what_reads_a_trial_is_not(tiny: Path) -> None:
    sweep = small_sweep(tiny, level={"kind": "full"})
    assert [stage.name for stage in shared(sweep, base(sweep), drawn(sweep))] == ["data", "meta", "teacher", "split"]


def test_a_cohort_with_room_goes_when_there_is_room_for_its_worker(pairs: list[Stage]) -> None:
    nodes = [Node("node", {"CPU": 1.0}, id="a")]
    placer, first, late = Gathering(), pairs[:3], pairs[3:5]
    assert [len(seat.stages) for seat in placer.seats(first, View(nodes))] == [3]
    busy = [Occupied(Seat(tuple(first), first[0].resources), "a", 1.0)]
    assert placer.seats(late, View(nodes, busy)) == []
    assert [len(seat.stages) for seat in placer.seats(late, View(nodes))] == [2]


def test_a_cohort_that_is_full_waits_for_nobody(pairs: list[Stage]) -> None:
    nodes = [Node("node", {"CPU": 1.0}, id="a")]
    busy = [Occupied(Seat(tuple(pairs), pairs[0].resources), None, 0.0)]
    assert [len(seat.stages) for seat in Gathering().seats(pairs, View(nodes, busy))] == [8]
