"""How many trials a cluster takes, and what they share."""

from pathlib import Path

import pytest
from small_sweeps import of_point, small_sweep

from m2mkd_ray.execution import Gathering, Stage, View
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.placement import Occupied, Seat
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.points import base, recipes, targets
from m2mkd_ray.sweeps.room import max_concurrent, of_a_worker
from m2mkd_ray.sweeps.tuning import shared
from m2mkd_ray.sweeps.watched import ranks_held


@pytest.fixture
def pairs(tiny: Path) -> list[Stage]:
    """The pairs of eight trials, which are mates."""
    sweep = small_sweep(tiny)
    return [stage for point in drawn(sweep) or () for stage in of_point(sweep, point)]


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


def test_where_nodes_may_come_a_cohort_is_asked_for_that_no_worker_could_take(pairs: list[Stage]) -> None:
    """Only a head without cores: nothing is at work that could become free, so the demand has to be seen."""
    head, placer = View([Node("head", {"CPU": 0.0}, id="h")]), Gathering(asks=True)
    assert Gathering().seats(pairs[:3], head) == []
    (seat,) = placer.seats(pairs[:3], head)
    asked_for = [Occupied(seat, None, 0.0)]
    assert placer.seats(pairs[3:5], View(head.nodes, asked_for)) == [], "its worker will have room for them"


@pytest.mark.parametrize(("cpus", "expected"), [(1, 8), (2, 8), (4, 16)])
def test_seeds_take_turns_on_few_workers(cpus: int, expected: int, tiny: Path) -> None:
    """Stages of two seeds are no mates: a full cohort of each, one after the other or side by side."""
    sweep = small_sweep(tiny, seeds=[0, 1])
    point = (drawn(sweep) or ())[0]
    stages = [stage for one in recipes(sweep, point).values() for stage in targets(sweep, one)]
    assert len({stage.mates for stage in stages}) == 2
    assert max_concurrent(stages, [Node("node", {"CPU": cpus})]) == expected
    assert of_a_worker(stages) == 8


def test_a_cohort_that_is_full_waits_for_nobody(pairs: list[Stage]) -> None:
    nodes = [Node("node", {"CPU": 1.0}, id="a")]
    busy = [Occupied(Seat(tuple(pairs), pairs[0].resources), None, 0.0)]
    assert [len(seat.stages) for seat in Gathering().seats(pairs, View(nodes, busy))] == [8]


@pytest.mark.parametrize(("count", "expected"), [(1, 8), (4, 2), (8, 1)])
def test_so_many_trials_wait_as_fill_a_worker(count: int, expected: int, pairs: list[Stage]) -> None:
    assert of_a_worker(pairs[:count]) == expected


def test_ranks_get_a_worker_when_there_is_room_for_them_or_nobody_else_has_any(tiny: Path) -> None:
    settings = {"placement.finetune": {"engine": "deepspeed", "num_workers": 2}}
    sweep = small_sweep(tiny, level={"kind": "full"}, settings=settings, budget={"trials": 3})
    tuned = [stage for point in drawn(sweep) or () for stage in of_point(sweep, point)]
    placer = Gathering(ranks_held)

    def seated(cpus: float, *busy: Stage) -> int:
        occupied = [Occupied(Seat((stage,), stage.resources), "a", 1.0) for stage in busy]
        return len(
            placer.seats([stage for stage in tuned if stage not in busy], View([Node("a", {"CPU": cpus})], occupied))
        )

    assert [seated(cpus) for cpus in (1, 2, 3, 4, 6)] == [1, 1, 1, 2, 3]
    assert [seated(cpus, tuned[0]) for cpus in (2, 3, 4, 6)] == [0, 0, 1, 2]
