"""The planner's seats, and what they come to when it is asked again and again in counted time."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from toy import Number, add

from m2mkd_ray.errors import PlanError
from m2mkd_ray.execution import LocalLauncher, NoPlacement, Resources, Stage, Store, execute
from m2mkd_ray.execution.cohort import Left, Member
from m2mkd_ray.execution.failures import Kind
from m2mkd_ray.execution.feasibility import Node, lack
from m2mkd_ray.execution.placement import Occupied, Seat, View
from m2mkd_ray.execution.planning.bounds import lower_bound
from m2mkd_ray.execution.planning.fleet import devices_for, node_id
from m2mkd_ray.execution.planning.forecast import Visit, forecast
from m2mkd_ray.execution.planning.planner import START_S, ByHand, Planner
from m2mkd_ray.execution.planning.works import ANY, Work
from m2mkd_ray.execution.stage import Spread

GPU = Resources(cpus=1, gpus=1)


class Ranks(NoPlacement, frozen=True, extra="forbid"):
    """A placement that says how many devices."""

    ranks: int = 1


def together(members: Sequence[Member]) -> Iterator[Left]:
    """Some way to run members together."""
    yield from (Left(place, {}) for place in range(len(members)))


def stage(name: str, resources: Resources = GPU, **more: object) -> Stage:
    return Stage(name, add, Number(value=len(name)), resources=resources, **more)  # type: ignore[arg-type]


def pair(number: int, **more: object) -> Stage:
    return stage(f"pair-{number}", mates="pairs", together=together, **more)


def gpu_node(name: str, gpus: int, kind: str = "H100", cpus: int | None = None) -> Node:
    return Node(name, {"CPU": cpus or 8 * gpus, "GPU": gpus, f"accelerator_type:{kind}": 1}, id=f"id-{name}")


def names(seat: Seat) -> list[str]:
    return [stage.name for stage in seat.stages]


def test_stages_that_different_functions_run_are_no_cohort_though_they_read_the_same() -> None:
    def otherwise(members: Sequence[Member]) -> Iterator[Left]:
        yield from together(members)

    ready = [pair(0), pair(1), replace(pair(2), together=otherwise), replace(pair(3), together=otherwise)]
    works = {each.name: Work("", {ANY: 10.0}, shared=0.6) for each in ready}
    seats = Planner(works, policy="cohort", members=4).seats(ready, View([gpu_node("a", 2)]))
    assert sorted(sorted(names(seat)) for seat in seats) == [["pair-0", "pair-1"], ["pair-2", "pair-3"]]


def test_only_what_checkpoints_leave_of_a_stage_counts() -> None:
    long, short, view = stage("long"), stage("short"), View([gpu_node("a", 1)])
    left = {long.address: 1.0, short.address: 1.0}
    planner = Planner({"long": Work("", {ANY: 10.0}), "short": Work("", {ANY: 6.0})}, left=left.__getitem__)
    (seat,) = planner.seats([long, short], view)
    assert names(seat) == ["long"]
    left[long.address] = 0.1  # at work; its seconds count from the start of its seat
    assert planner.expected_s(seat, "H100", view) == 10
    busy = View(view.nodes, [Occupied(seat, "id-a", 9.0)])
    assert planner.seats([short], busy) == []
    (seat,) = planner.seats([long, short], view)  # it was preempted
    assert names(seat) == ["short"]
    assert planner.works([long], view.nodes, {})[long.address].seconds_on("H100") == pytest.approx(1.0)


def test_the_longest_stages_get_the_free_devices_and_the_others_wait() -> None:
    ready = [stage(f"s{i}") for i in range(4)]
    seconds = {"s0": 1.0, "s1": 4.0, "s2": 3.0, "s3": 2.0}
    seats = Planner().seats(ready, View([gpu_node("a", 2)], seconds=seconds))
    assert [names(seat) for seat in seats] == [["s1"], ["s2"]]
    assert {seat.node for seat in seats} == {"id-a"}
    assert all(seat.resources == GPU for seat in seats)


def test_where_the_cluster_may_grow_the_others_ask_without_a_node() -> None:
    ready = [stage(f"s{i}") for i in range(4)]
    seats = Planner(grows=True).seats(ready, View([gpu_node("a", 2)], seconds={"s1": 4.0, "s2": 3.0}))
    assert [seat.node for seat in seats].count(None) == 2
    assert sorted(name for seat in seats for name in names(seat)) == ["s0", "s1", "s2", "s3"]


def test_what_fits_no_node_now_is_asked_for_where_the_cluster_may_grow_and_else_waits() -> None:
    view = View([Node("cpu", {"CPU": 8.0})])
    assert Planner().seats([stage("s")], view) == []
    (seat,) = Planner(grows=True).seats([stage("s")], view)
    assert (seat.node, seat.resources) == (None, GPU)


def test_a_stage_that_holds_nothing_starts_at_once_anywhere() -> None:
    (seat,) = Planner().seats([stage("driver", Resources(cpus=0))], View([gpu_node("a", 1)]))
    assert (seat.node, seat.resources) == (None, Resources(cpus=0))


def test_mates_share_a_device_and_keep_what_they_are() -> None:
    works = {f"pair-{i}": Work("", {ANY: 10.0}, shared=0.4) for i in range(4)}
    ready = [pair(i) for i in range(4)]
    (seat,) = Planner(works).seats(ready, View([gpu_node("a", 1)]))
    assert sorted(names(seat)) == [f"pair-{i}" for i in range(4)]
    assert {each.key for each in seat.stages} == {each.key for each in ready}
    alone = [replace(each, together=None) for each in ready]
    assert [len(seat.stages) for seat in Planner(works).seats(alone, View([gpu_node("a", 1)]))] == [1]


def test_works_that_leave_a_gpu_idle_get_a_fraction_of_it() -> None:
    works = {f"s{i}": Work("", {ANY: 10.0}, occupancy=0.3) for i in range(3)}
    seats = Planner(works).seats([stage(f"s{i}") for i in range(3)], View([gpu_node("a", 1)]))
    assert [seat.resources.gpus for seat in seats] == [0.3333] * 3
    assert all(seat.stages[0].resources == seat.resources for seat in seats)


def test_the_longest_stage_is_spread_over_idle_devices() -> None:
    spread = {2: Spread(Resources(cpus=0.5), Ranks(ranks=2), GPU)}
    works = {"long": Work("", {ANY: 100.0}), "short": Work("", {ANY: 50.0})}
    seats = Planner(works).seats([stage("long", spread=spread), stage("short")], View([gpu_node("a", 3)]))
    (seat,) = (seat for seat in seats if names(seat) == ["long"])
    assert seat.resources == Resources(cpus=0.5) == seat.stages[0].resources
    assert seat.stages[0].placement == Ranks(ranks=2)


def test_what_a_spread_stage_holds_on_its_devices_is_not_given_away() -> None:
    spread = {2: Spread(Resources(cpus=0.5), Ranks(ranks=2), GPU)}
    wide = stage("long", Resources(cpus=0.5), placement=Ranks(ranks=2), spread=spread)
    at_work = Occupied(Seat((wide,), wide.resources, "id-a"), "id-a", 1.0)
    assert Planner().seats([stage("s")], View([gpu_node("a", 2)], [at_work], {"long": 9.0})) == []
    assert len(Planner().seats([stage("s")], View([gpu_node("a", 3)], [at_work], {"long": 9.0}))) == 1


def test_a_stage_waits_for_a_fast_node_rather_than_start_on_a_slow_one() -> None:
    nodes = [Node("fast", {"CPU": 1}, labels={"ray.io/node-group": "fast"}), Node("slow", {"CPU": 1})]
    busy = Occupied(Seat((stage("old", Resources()),), Resources(), "fast"), "fast", 3.0)
    planner = Planner(speeds={"fast": 4.0})
    seconds = {"old": 16.0, "new": 40.0}
    assert planner.seats([stage("new", Resources())], View(nodes, [busy], seconds)) == []
    later = Occupied(busy.seat, "fast", 0.0)
    (seat,) = planner.seats([stage("new", Resources())], View(nodes, [later], {"old": 400.0, "new": 40.0}))
    assert seat.node == "slow"


def test_a_stage_that_is_late_holds_its_device_still() -> None:
    busy = Occupied(Seat((stage("old"),), GPU, "id-a"), "id-a", 1000.0)
    assert Planner().seats([stage("new")], View([gpu_node("a", 1)], [busy], {"old": 1.0})) == []


def test_gpus_that_no_core_can_feed_are_not_used() -> None:
    assert len(devices_for(Resources(cpus=4, gpus=1), [gpu_node("a", 4, cpus=8)], [])) == 2


def test_a_gpu_node_whose_cores_others_hold_waits_for_them() -> None:
    beside = Occupied(Seat((stage("data", Resources(cpus=8)),), Resources(cpus=8), "id-a"), "id-a", 0.0)
    assert Planner().seats([stage("s")], View([gpu_node("a", 1)], [beside], {"data": 5.0})) == []


def test_what_is_set_by_hand_is_kept_and_the_rest_planned() -> None:
    nodes = [gpu_node("a", 2), gpu_node("b", 1, "L4")]
    hand = {
        "pair-0": ByHand(cohort="x"), "pair-1": ByHand(cohort="x"), "pair-2": ByHand(gpus=0.5, node_type="L4"),
    }  # fmt: skip
    seats = Planner(by_hand=hand).seats([pair(i) for i in range(4)], View(nodes))
    found = {tuple(sorted(names(seat))): seat for seat in seats}
    assert set(found) == {("pair-0", "pair-1"), ("pair-2",), ("pair-3",)}
    assert (found["pair-2",].node, found["pair-2",].resources.gpus) == ("id-b", 0.5)


# In counted time


def run(stages: Sequence[Stage], planner: Planner, nodes: Sequence[Node], works: dict[str, Work]) -> list[Visit]:
    """All stages, with durations that differ a little from what the planner expects."""
    rng = random.Random(1)

    def duration(seat: Seat, node: Node) -> float:
        return planner.expected_s(seat, node.name.split("-")[0], View(nodes)) * rng.uniform(0.97, 1.03)

    return forecast(stages, planner, nodes, duration)


@pytest.mark.parametrize(
    ("num_stages", "num_nodes"), [(16, 4), (128, 16), pytest.param(512, 64, marks=pytest.mark.slow)]
)
def test_mixed_speeds_end_within_a_twentieth_of_the_bound_when_asked_at_each_end(
    num_stages: int, num_nodes: int
) -> None:
    rng = random.Random(0)
    speeds = {"x1": 1.0, "x2": 2.0, "x4": 4.0}
    kinds = rng.choices(list(speeds), k=num_nodes)
    nodes = [Node(f"{kind}-{i}", {"CPU": 1}, labels={"ray.io/node-group": kind}) for i, kind in enumerate(kinds)]
    costs = {f"s{i}": rng.uniform(4, 20) for i in range(num_stages)}
    works = {name: Work(name, {kind: cost / speed for kind, speed in speeds.items()}) for name, cost in costs.items()}
    visits = run([stage(name, Resources()) for name in works], Planner(works), nodes, works)
    assert len(visits) == num_stages
    bound = lower_bound(list(works.values()), devices_for(Resources(), nodes, []))
    assert max(visit.end_s for visit in visits) <= 1.05 * 1.03 * bound
    assert no_overlap(visits)


def no_overlap(visits: Sequence[Visit]) -> bool:
    by_node: dict[str, list[Visit]] = {}
    for visit in visits:
        by_node.setdefault(node_id(visit.node), []).append(visit)
    ordered = [sorted(of, key=lambda visit: visit.start_s) for of in by_node.values()]
    return all(a.end_s <= b.start_s + 1e-9 for of in ordered for a, b in pairwise(of))


def test_stages_wait_for_what_they_read() -> None:
    first = stage("first", Resources())
    second = replace(stage("second", Resources()), needs={"first": first})
    visits = forecast([second, first], Planner(), [Node("a", {"CPU": 2.0})], lambda seat, node: 2.0)
    assert [(visit.seat.stages[0].name, visit.start_s) for visit in visits] == [("first", 0.0), ("second", 2.0)]


def test_stages_that_no_node_can_take_end_the_forecast() -> None:
    with pytest.raises(PlanError, match="No node can take s"):
        forecast([stage("s")], Planner(), [Node("a", {"CPU": 2.0})], lambda seat, node: 1.0)


class Counted:
    """A planner whose seats are counted."""

    replans = True

    def __init__(self, planner: Planner) -> None:
        self.planner, self.given = planner, 0

    def seats(self, ready: Sequence[Stage], view: View) -> list[Seat]:
        seats = self.planner.seats(ready, view)
        self.given += len(seats)
        return seats

    def lacks(self, stage: Stage, view: View) -> str | None:
        return self.planner.lacks(stage, view)


@pytest.mark.parametrize("seed", range(12))
def test_every_seat_has_room_when_it_is_given_whatever_is_mixed(seed: int) -> None:
    rng = random.Random(seed)
    nodes = [
        gpu_node(f"{place}", rng.choice([1, 2, 4]), rng.choice(["H100", "L4"]), cpus=rng.choice([8, 16, 32]))
        for place in range(rng.randint(1, 4))
    ]
    spread = {2: Spread(Resources(cpus=0.5), Ranks(ranks=2), GPU)}
    kinds: list[dict[str, object]] = [
        {"mates": "m", "together": together}, {"spread": spread}, {"resources": Resources(cpus=2)}, {},
    ]  # fmt: skip
    stages, works = [], {}
    for number in range(rng.randint(5, 25)):
        made = stage(f"s{number}", **rng.choice(kinds))  # type: ignore[arg-type]
        needs = {"one": rng.choice(stages)} if stages and rng.random() < 0.3 else {}
        stages.append(replace(made, needs=needs))
        slow = rng.uniform(5, 50)
        works[made.name] = Work(
            made.name, {"H100": slow / 8, ANY: slow}, {ANY: rng.uniform(1, 20)}, shared=rng.uniform(0, 0.5),
            occupancy=rng.choice([0.25, 0.5, 1.0]),
        )  # fmt: skip
    counted = Counted(Planner(works))
    visits = forecast(stages, counted, nodes, lambda seat, node: rng.uniform(1, 20))
    assert counted.given == len(visits)
    assert sorted(name for visit in visits for name in names(visit.seat)) == sorted(works)


def test_what_comes_and_goes_is_planned_anew() -> None:
    ready = [stage(f"s{i}") for i in range(3)]
    planner = Planner()
    assert len(planner.seats(ready, View([gpu_node("a", 1)]))) == 1
    assert len(planner.seats(ready, View([gpu_node("a", 1), gpu_node("b", 1)]))) == 2
    assert [seat.node for seat in planner.seats(ready, View([]))] == [None] * 3


def test_a_node_whose_worker_has_not_begun_is_not_given_away_again() -> None:
    submitted = Occupied(Seat((stage("s0"),), GPU, "id-a"), None, 0.0)
    assert Planner().seats([stage("s1")], View([gpu_node("a", 1)], [submitted])) == []


# What a stage lacks


def test_a_stage_is_told_what_type_or_memory_of_gpu_it_lacks_and_gets_no_seat() -> None:
    view = View([gpu_node("a", 2, "L4")])
    works = {"s0": Work("", {ANY: 1.0}, {ANY: 60.0})}
    planner = Planner(works, by_hand={"s1": ByHand(node_type="H100")})
    stages = [stage("s0"), stage("s1"), stage("s2"), stage("s3", Resources(cpus=99)), stage("s4", Resources(cpus=0))]
    assert sorted(name for seat in planner.seats(stages, view) for name in names(seat)) == ["s2", "s4"]
    said = [planner.lacks(each, view) for each in stages]
    assert said[0] is not None
    assert said[0].startswith("60 GB of GPU memory, but no GPU has so much for it: the most on one of 2 is 24 GB")
    assert said[1] is not None
    assert said[1].startswith("a device of type H100, but the nodes have L4 (2)")
    assert said[2] is None
    assert said[3] == lack(Resources(cpus=99), view.nodes)
    assert said[4] is None


def test_where_the_cluster_may_grow_nothing_is_put_on_a_gpu_that_is_too_small() -> None:
    planner = Planner({"s": Work("", {ANY: 1.0}, {ANY: 60.0})}, grows=True)
    assert planner.seats([stage("s")], View([gpu_node("a", 2, "L4")])) == []


def test_a_cohort_by_hand_that_does_not_fit_waits_with_its_reason_and_the_rest_goes_on() -> None:
    works = {f"pair-{i}": Work("", {ANY: 9.0}, {ANY: 15.0}) for i in range(3)}
    planner = Planner(works, by_hand={"pair-0": ByHand(cohort="x"), "pair-1": ByHand(cohort="x")})
    ready, view = [pair(i) for i in range(3)], View([gpu_node("a", 2, "L4")])
    assert [names(seat) for seat in planner.seats(ready, view)] == [["pair-2"]]
    said = planner.lacks(ready[0], view)
    assert said is not None
    assert "cohort of 2 by hand, which needs 30 GB of GPU memory" in said
    assert planner.lacks(ready[2], view) is None


def test_a_cohort_by_hand_joins_mates_only() -> None:
    other = replace(stage("pair-0", mates="others", together=together), needs={"of": stage("other")})
    planner = Planner(by_hand={"pair-0": ByHand(cohort="x"), "pair-1": ByHand(cohort="x")})
    seats = planner.seats([pair(0), pair(1), other], View([gpu_node("a", 3)]))
    assert sorted((names(seat), {each.mates for each in seat.stages}) for seat in seats) == [
        (["pair-0"], {"others"}),
        (["pair-0", "pair-1"], {"pairs"}),
    ]
    crowded = replace(pair(0), together=None, mates="")  # as it is offered after it ran out of memory
    apart = planner.seats([crowded, pair(1)], View([gpu_node("a", 2)]))
    assert sorted(names(seat) for seat in apart) == [["pair-0"], ["pair-1"]]


# What costs


def test_types_that_come_later_are_planned_for_by_their_peaks() -> None:
    planner = Planner({"s": Work("", {"L4": 989.0}, {"L4": 9.0})})
    (work,) = planner.works([stage("s")], [gpu_node("a", 1, "L4"), gpu_node("b", 1, "H100")], {}).values()
    assert work.seconds_on("H100") == pytest.approx(121.0)  # peaks of 121 and 989 TFLOP/s
    assert work.memory_on("H100") == 9.0
    (seat,) = planner.seats([stage("s")], View([gpu_node("a", 1, "L4"), gpu_node("b", 1, "H100")]))
    assert seat.node == "id-b"


def test_a_type_that_cannot_run_a_stage_is_not_planned_for() -> None:
    planner = Planner({"s": Work("", {"L4": 9.0, "T4": math.inf})})
    view = View([gpu_node("a", 1, "T4")])
    assert planner.seats([stage("s")], view) == []
    said = planner.lacks(stage("s"), view)
    assert said is not None
    assert said.startswith("a device of type L4, but the nodes have T4 (1)")


def test_what_was_too_large_for_all_devices_says_so_and_goes_to_a_type_that_comes_later() -> None:
    planner, asked = Planner({"s": Work("", {"T4": math.inf})}), replace(stage("s"), flops=1e12)
    said = planner.lacks(asked, View([gpu_node("a", 1, "T4")]))
    assert said is not None
    assert said.startswith("more memory than the devices had on which it was tried, and the nodes have T4 (1)")
    (seat,) = planner.seats([asked], View([gpu_node("a", 1, "T4"), gpu_node("b", 1, "H100")]))
    assert seat.node == "id-b"


def test_cores_of_a_gpu_node_are_as_fast_as_others() -> None:
    on_cores = replace(stage("s", Resources()), flops=1e15)
    nodes = [gpu_node("a", 1), Node("b", {"CPU": 8.0})]
    (work,) = Planner().works([on_cores], nodes, {}).values()
    assert set(work.seconds) == {"cpu"}
    assert {device.type for device in devices_for(Resources(), nodes, [])} == {"cpu"}
    (work,) = Planner().works([replace(stage("s"), flops=1e15)], nodes, {}).values()
    assert set(work.seconds) == {"H100"}


def test_several_devices_are_used_unasked_only_where_they_are_gpus_and_pay_for_their_start() -> None:
    of_cores = {2: Spread(Resources(cpus=0.5), Ranks(ranks=2), Resources())}
    on_cores = stage("s", Resources(), spread=of_cores)
    of_gpus = {2: Spread(Resources(cpus=0.5), Ranks(ranks=2), GPU)}
    on_gpus = stage("s", spread=of_gpus)
    nodes = [gpu_node("a", 2)]

    def ranks(planner: Planner, asked: Stage) -> bool:
        (seat,) = planner.seats([asked], View(nodes))
        return seat.stages[0].placement == Ranks(ranks=2)

    long, short = {"s": Work("", {ANY: 100.0})}, {"s": Work("", {ANY: START_S})}
    assert not ranks(Planner(long), on_cores)
    assert ranks(Planner(long, by_hand={"s": ByHand(devices=2)}), on_cores)
    assert ranks(Planner(long), on_gpus)
    assert not ranks(Planner(short), on_gpus)


@pytest.mark.parametrize("share", [0.3, 0.35, 0.2])
def test_a_share_by_hand_is_what_is_given(share: float) -> None:
    planner = Planner(by_hand={f"s{i}": ByHand(gpus=share) for i in range(2)})
    seats = planner.seats([stage(f"s{i}") for i in range(2)], View([gpu_node("a", 1)]))
    assert [seat.resources.gpus for seat in seats] == [share, share]


class OnNodes(LocalLauncher):
    """Runs in this process what is asked to be on a node, as if it were not."""

    runs_in_process = False

    def nodes(self) -> list[Node]:
        return [gpu_node("a", 1, "L4")]


def test_a_stage_that_is_refused_for_its_type_is_given_up_with_the_reason_and_the_others_end(tmp_path: Path) -> None:
    stages = [stage("s0"), stage("s1", GPU)]
    planner = Planner(by_hand={"s1": ByHand(node_type="H100")})
    outcome = execute(stages, Store(str(tmp_path)), OnNodes(), place=planner, wait_timeout_s=0.1)
    assert [done.stage.name for done in outcome.complete] == ["s0"]
    (failure,) = outcome.failed
    assert failure.kind is Kind.UNPLACED
    assert "it asks for a device of type H100, but the nodes have L4 (1)" in failure.message
