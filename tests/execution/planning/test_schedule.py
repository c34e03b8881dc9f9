"""Schedules against brute force, against the lower bound, and against what no schedule may do."""

import random
from collections.abc import Iterator, Sequence
from itertools import permutations, product

import pytest

from m2mkd_ray.errors import PlanError
from m2mkd_ray.execution.planning.bounds import lower_bound, refusals
from m2mkd_ray.execution.planning.schedule import SPOT_LOSS, Schedule, schedule
from m2mkd_ray.execution.planning.works import ANY, Device, Work, together_s

SPEEDS = {"slow": 1.0, "fast": 2.0, "faster": 3.5}


def alone(name: str, seconds: float, **more: object) -> Work:
    return Work(name, {kind: seconds / speed for kind, speed in SPEEDS.items()}, **more)  # type: ignore[arg-type]


def devices(*types: str, node: str | None = None) -> list[Device]:
    return [Device(node or f"node-{place}", name) for place, name in enumerate(types)]


# The optimum, by trying everything


def partitions(works: Sequence[Work]) -> Iterator[list[list[Work]]]:
    """All ways to put works into cohorts of mates."""
    if not works:
        yield []
        return
    first, rest = works[0], works[1:]
    for groups in partitions(rest):
        yield [[first], *groups]
        for place, group in enumerate(groups):
            if first.mates and first.mates == group[0].mates and len(group) < min(w.members for w in [first, *group]):
                yield [*groups[:place], [first, *group], *groups[place + 1 :]]


def optimum(works: Sequence[Work], fleet: Sequence[Device]) -> float:
    """The shortest makespan of bundles on one device each: every partition into cohorts, every assignment."""
    best = float("inf")
    for groups in partitions(works):
        for places in product(range(len(fleet)), repeat=len(groups)):
            loads = [0.0] * len(fleet)
            for group, place in zip(groups, places, strict=True):
                loads[place] += together_s(group, fleet[place].type)
            best = min(best, max(loads))
    return best


def optimum_spread(works: Sequence[Work], num_devices: int) -> float:
    """The shortest makespan on equal devices of one node where works may be spread: every order, every width."""
    best = float("inf")
    for order in permutations(works):
        for widths in product(*(sorted(work.widths) for work in order)):
            free = [0.0] * num_devices
            for work, width in zip(order, widths, strict=True):
                start = sorted(free)[width - 1]
                free = [start + work.seconds["slow"] / (width * work.widths[width])] * width + sorted(free)[width:]
            best = min(best, max(free))
    return best


@pytest.mark.parametrize("seed", range(25))
def test_the_schedule_is_within_a_tenth_of_the_optimum(seed: int) -> None:
    rng = random.Random(seed)
    fleet = devices(*rng.choices(list(SPEEDS), k=rng.randint(1, 3)))
    works = [
        alone(f"w{i}", rng.uniform(1, 9), mates=rng.choice(["", "m", "m"]), members=rng.randint(2, 4),
              shared=rng.uniform(0, 0.7))
        for i in range(rng.randint(1, 5))
    ]  # fmt: skip
    best = optimum(works, fleet)
    found = schedule(works, fleet)
    assert lower_bound(works, fleet) <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found.makespan_s <= 1.1 * best


@pytest.mark.parametrize("seed", range(25))
def test_spreading_is_within_a_tenth_of_the_optimum(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(2, 4)
    widths = {1: 1.0, 2: rng.uniform(0.8, 1), 4: rng.uniform(0.6, 0.8)}
    widths = {width: efficiency for width, efficiency in widths.items() if width <= count}
    works = [alone(f"w{i}", rng.uniform(1, 9), widths=widths) for i in range(rng.randint(1, 4))]
    best = optimum_spread(works, count)
    found = schedule(works, devices(*["slow"] * count, node="n"))
    assert lower_bound(works, found.devices) <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found.makespan_s <= 1.1 * best


# What holds for every schedule


def random_case(seed: int) -> tuple[list[Work], list[Device]]:
    rng = random.Random(seed)
    fleet = []
    for node in range(rng.randint(1, 5)):
        kind, spot, slots = rng.choice(list(SPEEDS)), rng.random() < 0.3, rng.choice([1, 2, 4])
        memory = rng.choice([24.0, 80.0])
        for _ in range(rng.choice([1, 2, 4])):
            busy = ((rng.choice([0.5, 1.0]), rng.uniform(0.1, 5)),) if rng.random() < 0.3 else ()
            fleet.append(Device(f"node-{node}", kind, memory, spot, slots, busy))
    works = []
    for i in range(rng.randint(1, 30)):
        widths = rng.choice([{1: 1.0}, {1: 1.0, 2: 0.95, 4: 0.9}])
        works.append(
            alone(
                f"w{i}", rng.uniform(1, 20), memory_gb={ANY: rng.uniform(1, 24)}, mates=rng.choice(["", "a", "b"]),
                members=rng.randint(1, 8), shared=rng.uniform(0, 0.6), occupancy=rng.choice([0.2, 0.5, 1.0]),
                widths=widths,
            )
        )  # fmt: skip
    return works, fleet


def used_at(found: Schedule, device: int, time: float) -> list[tuple[float, float]]:
    """Share and memory of a device that are used at a time, by what is booked and what was there."""
    of = found.devices[device]
    booked = [b for b in found.bookings if device in b.devices and b.start_s <= time < b.end_s]
    memory = [sum(work.memory_on(of.type) for work in b.works) for b in booked]
    shares = [(b.share, needed) for b, needed in zip(booked, memory, strict=True)]
    return shares + [(share, 0.0) for share, until in of.busy if time < until]


@pytest.mark.parametrize("seed", range(20))
def test_no_device_is_used_twice_nor_its_memory_exceeded_and_every_work_runs_once(seed: int) -> None:
    works, fleet = random_case(seed)
    found = schedule(works, fleet)
    assert sorted(work.name for b in found.bookings for work in b.works) == sorted(work.name for work in works)
    for booking in found.bookings:
        assert booking.start_s >= 0
        assert len({found.devices[device].node for device in booking.devices}) == 1
        assert len(booking.works) <= min(work.members for work in booking.works)
        assert len({work.mates for work in booking.works}) == 1
        for device in booking.devices:
            used = used_at(found, device, booking.start_s)
            assert sum(share for share, _ in used) <= 1 + 1e-9
            assert sum(memory for _, memory in used) <= found.devices[device].memory_gb * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_every_booking_takes_as_long_as_its_form_does(seed: int) -> None:
    works, fleet = random_case(seed)
    for booking in schedule(works, fleet).bookings:
        device = fleet[booking.devices[0]]
        seconds = together_s(booking.works, device.type) * (1 + SPOT_LOSS if device.spot else 1)
        if (width := len(booking.devices)) > 1:
            seconds /= width * booking.works[0].widths[width]
        assert booking.end_s - booking.start_s == pytest.approx(seconds)


@pytest.mark.parametrize("seed", range(20))
def test_the_makespan_is_never_below_the_lower_bound(seed: int) -> None:
    works, fleet = random_case(seed)
    for policy in ("auto", "alone", "cohort"):
        assert schedule(works, fleet, policy=policy).makespan_s >= lower_bound(works, fleet) * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_grahams_bound_holds_on_identical_devices(seed: int) -> None:
    """LPT ends within 4/3 - 1/(3m) of the optimum (Graham 1969, theorem 2), also without improvement."""
    rng = random.Random(seed)
    count = rng.randint(2, 3)
    works = [alone(f"w{i}", rng.randint(1, 9)) for i in range(rng.randint(2, 7))]
    fleet = devices(*["slow"] * count)
    found = schedule(works, fleet, budget=0)
    assert found.makespan_s <= (4 / 3 - 1 / (3 * count)) * optimum(works, fleet) + 1e-9


def test_grahams_worst_case_is_improved() -> None:
    """5, 5, 4, 4, 3, 3, 3 on three devices: longest first ends at 11, the optimum is 9."""
    works = [alone(f"w{i}", seconds) for i, seconds in enumerate([5, 5, 4, 4, 3, 3, 3])]
    assert schedule(works, devices(*["slow"] * 3), budget=0).makespan_s == 11
    assert schedule(works, devices(*["slow"] * 3)).makespan_s == 9


def test_512_works_on_64_nodes_of_mixed_speeds_end_within_a_twentieth_of_the_bound() -> None:
    rng = random.Random(0)
    works = [alone(f"w{i}", rng.lognormvariate(2, 0.6)) for i in range(512)]
    found = schedule(works, devices(*rng.choices(list(SPEEDS), k=64)))
    assert found.makespan_s <= 1.05 * found.bound_s
    assert found.placements <= 512 + 6_000 + 512


# Forms


PAIRS = (119.0, 109.0, 99.0, 89.0)
"""GFLOP an image of the four pairs of DeiT-L and V-MoE-B."""


def pairs(**more: object) -> list[Work]:
    return [alone(f"pair-{i}", cost, mates="pairs", members=8, **more) for i, cost in enumerate(PAIRS)]


def groups(found: Schedule) -> list[set[str]]:
    return [{work.name for work in booking.works} for booking in found.bookings]


def test_on_one_device_all_share_a_cohort() -> None:
    found = schedule(pairs(shared=0.3), devices("slow"))
    assert groups(found) == [{"pair-0", "pair-1", "pair-2", "pair-3"}]
    assert found.makespan_s == pytest.approx(0.7 * sum(PAIRS) + 0.3 * 119)
    assert found.makespan_s == pytest.approx(found.bound_s)


def test_on_two_devices_two_even_cohorts() -> None:
    found = schedule(pairs(shared=0.3), devices("slow", "slow"))
    assert groups(found) == [{"pair-0", "pair-3"}, {"pair-1", "pair-2"}]


def test_with_a_device_for_each_nobody_shares() -> None:
    found = schedule(pairs(shared=0.3), devices(*["slow"] * 4))
    assert [len(group) for group in groups(found)] == [1, 1, 1, 1]
    assert found.makespan_s == 119


def test_cohorts_that_share_nothing_are_not_formed() -> None:
    found = schedule(pairs(shared=0.0), devices("slow", "slow"))
    assert [len(group) for group in groups(found)] == [1, 1, 1, 1]


def test_short_works_share_where_the_longest_takes_as_long_anyway() -> None:
    works = [alone(f"w{i}", cost, mates="m", members=4, shared=0.5) for i, cost in enumerate([100, 20, 20, 20])]
    found = schedule(works, devices(*["slow"] * 4))
    assert found.makespan_s == 100
    assert found.device_s == pytest.approx(100 + 3 * 10 + 10)


def test_a_cohort_never_exceeds_the_memory() -> None:
    found = schedule(pairs(shared=0.6, memory_gb={ANY: 9.0}), [Device("n", "slow", memory_gb=20)])
    assert sorted(len(group) for group in groups(found)) == [2, 2]


def test_the_policy_alone_and_the_policy_cohort_are_kept() -> None:
    assert len(schedule(pairs(shared=0.3), devices("slow"), policy="alone").bookings) == 4
    assert len(schedule(pairs(shared=0.3), devices(*["slow"] * 4), policy="cohort").bookings) == 1


def test_works_that_leave_a_device_idle_share_it() -> None:
    works = [alone(f"w{i}", 10, occupancy=0.25) for i in range(4)]
    found = schedule(works, [Device("n", "slow", slots=4)])
    assert found.makespan_s == pytest.approx(10)
    assert {booking.share for booking in found.bookings} == {0.25}
    assert found.device_s == pytest.approx(10)


def test_fractions_need_memory_and_cpu_cores() -> None:
    works = [alone(f"w{i}", 10, occupancy=0.25, memory_gb={ANY: 9.0}) for i in range(4)]
    assert schedule(works, [Device("n", "slow", memory_gb=20, slots=4)]).makespan_s == pytest.approx(20)
    assert schedule(works, [Device("n", "slow", memory_gb=80, slots=1)]).makespan_s == pytest.approx(40)


def test_the_longest_work_gets_the_idle_devices() -> None:
    works = [alone("long", 100, widths={1: 1.0, 2: 0.95}), alone("a", 40), alone("b", 40)]
    found = schedule(works, devices(*["slow"] * 4, node="n"))
    by_name = {booking.works[0].name: booking for booking in found.bookings}
    assert len(by_name["long"].devices) == 2
    assert found.makespan_s == pytest.approx(100 / 1.9)


def test_nothing_is_spread_over_two_nodes() -> None:
    found = schedule([alone("long", 100, widths={1: 1.0, 2: 1.0})], devices("slow", "slow"))
    assert found.makespan_s == 100


def test_a_work_waits_for_a_fast_device_that_ends_it_earlier() -> None:
    fleet = [Device("a", "faster", busy=((1.0, 2.0),)), Device("b", "slow")]
    (booking,) = schedule([alone("w", 7)], fleet).bookings
    assert booking.devices == (0,)
    assert (booking.start_s, booking.end_s) == (2.0, 4.0)


def test_the_longest_works_get_the_nodes_that_stay() -> None:
    fleet = [Device("spot", "slow", spot=True), Device("kept", "slow")]
    found = schedule([alone("short", 5), alone("long", 9)], fleet)
    assert {b.works[0].name: fleet[b.devices[0]].node for b in found.bookings} == {"long": "kept", "short": "spot"}


def test_what_is_set_by_hand_is_kept() -> None:
    works = [
        alone("a", 9, cohort="x"),
        alone("b", 9, cohort="x"),
        alone("c", 9, share=0.5),
        alone("d", 9, widths={2: 1}),
    ]
    found = schedule(works, [Device("n", "slow", slots=2) for _ in range(4)])
    by_names = {"".join(sorted(work.name for work in b.works)): b for b in found.bookings}
    assert set(by_names) == {"ab", "c", "d"}
    assert by_names["c"].share == 0.5
    assert len(by_names["d"].devices) == 2


def test_a_cohort_by_hand_that_fits_no_device_is_refused() -> None:
    works = [alone(name, 9, cohort="x", memory_gb={ANY: 15.0}) for name in "ab"]
    with pytest.raises(PlanError, match="a asks for a place in a cohort of 2 by hand, which needs 30 GB"):
        schedule(works, [Device("n", "slow", memory_gb=24)])


# Refusals


@pytest.mark.parametrize(
    ("work", "fleet", "says"),
    [
        (Work("pair-0", {"H100": 9}), devices("L4", "L4", "T4"), "type H100, but the nodes have L4 (2), T4 (1)"),
        (
            Work("pair-0", {ANY: 9}, {ANY: 30}),
            [Device("a", "L4", 24), Device("b", "T4", 16)],
            "pair-0 asks for 30 GB of GPU memory, but no GPU has so much for it: the most on one of 2 is 24 GB",
        ),
        (Work("pair-0", {ANY: 9}, widths={2: 1.0}), devices("L4", "L4"), "2 devices of one node, but no node has"),
        (Work("pair-0", {ANY: 9}), [], "the nodes have none"),
    ],
)  # fmt: skip
def test_what_no_device_can_take_is_refused_with_what_is_missing(work: Work, fleet: list[Device], says: str) -> None:
    (problem,) = refusals([work], fleet).values()
    assert says in problem
    with pytest.raises(PlanError, match="pair-0"):
        schedule([work], fleet)


def test_utilisation_counts_all_devices_until_the_end() -> None:
    found = schedule([alone("a", 8), alone("b", 4)], devices("slow", "slow"))
    assert found.device_s == 12
    assert found.utilisation == pytest.approx(12 / 16)
    assert found.bound_s == 8


def test_nothing_to_do_takes_no_time() -> None:
    assert schedule([], devices("slow")).makespan_s == 0
