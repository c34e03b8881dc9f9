"""Nodes come and go under a run: what no node can hold waits with a reason, and goes on or is given up."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import ray
import toy
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from toy import Number, Pace, number

from m2mkd_ray.execution import (
    Event,
    Kind,
    Resources,
    Seat,
    Stage,
    StageRetried,
    StageStarted,
    StageWaits,
    Store,
    View,
    execute,
    plan_status,
)
from m2mkd_ray.execution.given import AsGiven
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.execution.relay import Relay
from m2mkd_ray.stages.group import Group, run_ranks

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

BIG = Resources(cpus=2)


class Machines:
    """A cluster whose head has one core; nodes of two cores come and go."""

    def __init__(self, folder: str) -> None:
        head = {
            "num_cpus": 1,
            "include_dashboard": False,
            "temp_dir": f"{folder}/nodes",
            # A node that says nothing is taken for dead after three seconds, not after fifteen.
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 6},
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.launcher = RayLauncher(self.cluster.address)

    def add(self, group: str = "") -> "ray._private.node.Node":
        """Add a node of two cores, with the label of a group if one is named, and wait until it is known."""
        node = self.cluster.add_node(num_cpus=2, labels={"m2mkd.node-group": group} if group else {})
        self.wait_until(lambda: node.node_id in self.ids())
        return node

    def ids(self) -> set[str]:
        """Of the nodes that Ray takes for alive."""
        return {node.id for node in self.launcher.nodes()}

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is true."""
        deadline = time.monotonic() + 120
        while not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def drain(self, node: "ray._private.node.Node") -> None:
        """Say that a node will be taken away in a minute, as `ray drain-node` does."""
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = ray._raylet.GcsClient(address=self.cluster.address)
        is_accepted, why = client.drain_node(node.node_id, reason, "spot", int((time.time() + 60) * 1000))
        assert is_accepted, why

    def remove(self, node: "ray._private.node.Node") -> None:
        """Take a node away without notice."""
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def machines(short_folder: str) -> Iterator[Machines]:
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setattr("m2mkd_ray.execution.seating._NODES_EVERY_S", 0.3)
    machines = Machines(short_folder)
    yield machines
    machines.launcher.close()
    machines.cluster.shutdown()
    patch.undo()


def big(name: str, value: int, sleep_s: float = 0.0) -> Stage:
    return Stage(name, toy.add, Number(value=value), resources=BIG, placement=Pace(sleep_s=sleep_s))


def test_when_its_node_is_lost_a_stage_waits_with_a_reason_and_is_given_up(machines: Machines, store: Store) -> None:
    node = machines.add()
    events: list[Event] = []
    seen: list[str] = []

    def lose(event: Event) -> None:
        events.append(event)
        if isinstance(event, StageWaits):
            seen.extend(found.waits for found in plan_status([event.stage], store))
        if isinstance(event, StageStarted) and event.stage.name == "first":
            machines.remove(node)

    plan = [big("first", 1, sleep_s=30.0), big("second", 2), number("small", 3, Pace(sleep_s=3.0))]
    outcome = execute(plan, store, machines.launcher, on_event=lose, wait_timeout_s=4.0)
    assert [done.stage.name for done in outcome.complete] == ["small"]  # siblings go on
    assert [(failure.stage.name, failure.kind) for failure in outcome.failed] == [
        ("first", Kind.UNPLACED),
        ("second", Kind.UNPLACED),
    ]
    for failure in outcome.failed:
        assert failure.message == (
            "No node could hold it for 4 s: it asks for 2 CPUs, but no node has so much: the most on one of 1 is "
            "1 CPU. Lower the stages' resources or add a larger node."
        )
        assert "add a node that has what it asks for" in failure.reason
    waits = [event for event in events if isinstance(event, StageWaits)]
    assert sorted(event.stage.name for event in waits) == ["first", "second"]
    assert seen == [event.reason for event in waits]  # `m2mkd status` shows it from the store
    assert [store.waits(stage.address) for stage in plan] == ["", "", ""]
    assert all(abs(event.since - time.time()) < 30 for event in waits)
    retried = [(event.stage.name, event.kind) for event in events if isinstance(event, StageRetried)]
    assert retried == [("first", Kind.LOST)]  # the other had not begun


def test_when_a_node_comes_what_waited_goes_on(machines: Machines, store: Store) -> None:
    waits, outcomes = threading.Event(), []

    def note(event: Event) -> None:
        if isinstance(event, StageWaits):
            waits.set()

    def drive() -> None:
        plan = [big("late", 1)]
        outcomes.append(execute(plan, store, machines.launcher, on_event=note, wait_timeout_s=60.0))

    driver = threading.Thread(target=drive)
    driver.start()
    assert waits.wait(timeout=120)
    node = machines.add()
    driver.join(timeout=120)
    machines.remove(node)
    machines.wait_until(lambda: node.node_id not in machines.ids())
    (outcome,) = outcomes
    assert [done.stage.name for done in outcome.complete] == ["late"]


def test_a_stage_waits_for_a_node_of_its_group_and_ranks_are_there_too(
    machines: Machines, store: Store, tmp_path: Path
) -> None:
    """Another node has room all the time."""
    nodes, waits = [machines.add("other")], []

    def add_when_it_waits(event: Event) -> None:
        if isinstance(event, StageWaits):
            waits.append(event.reason)
            nodes.append(machines.add("mine"))

    stage = Stage("grouped", toy.add, Number(), resources=Resources(cpus=2, node_group="mine"))
    execute([stage], store, machines.launcher, on_event=add_when_it_waits, wait_timeout_s=60.0).raise_for_failures()
    assert waits == ["2 CPUs on a node of group mine, but there is none: the nodes are of other."]
    _, mine = nodes
    assert store.manifest(stage.address)["where"]["node_id"] == mine.node_id
    nodes.append(machines.add("ranks"))  # on `mine` a warm worker is left
    group = Group(2, 1, 0, max_failures=0, start_timeout_s=60, node_group="ranks")
    drive, to_stage = ray.remote(num_cpus=0)(run_ranks), ray.remote(num_cpus=0)(Relay).remote()
    durable = str(tmp_path / "ranks")
    done = drive.remote(toy.note_node, str(tmp_path), group, durable=durable, to_stage=to_stage, what="the ranks")
    ray.get(done, timeout=60)
    assert [file.read_text() for file in sorted(tmp_path.glob("rank-*"))] == [nodes[-1].node_id] * 2
    for node in nodes:
        machines.remove(node)
    machines.wait_until(lambda: len(machines.ids()) == 1)  # the head


class OnTheLastNode:
    """Seats everything on the node that came last, or leaves it out if it is not known yet."""

    replans = True

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def seats(self, ready: Sequence[Stage], view: View) -> list[Seat]:
        self.asked.append(sorted(stage.name for stage in ready))
        best = max(view.nodes, key=lambda node: node.resources.get("CPU", 0.0))
        return [Seat((stage,), stage.resources, best.id) for stage in ready]

    def lacks(self, stage: Stage, view: View) -> str | None:
        return AsGiven().lacks(stage, view)


def test_seats_on_a_node_that_goes_are_asked_for_anew(machines: Machines, store: Store) -> None:
    node, placer = machines.add(), OnTheLastNode()
    gone = node.node_id
    removed: list[bool] = []

    def lose(event: Event) -> None:
        if isinstance(event, StageStarted) and not removed:
            removed.append(True)
            machines.remove(node)

    plan = [number(f"n-{i}", i, Pace(sleep_s=0.0 if i else 30.0)) for i in range(4)]
    last = [Stage(stage.name, stage.run, stage.config, placement=Pace(sleep_s=2.0)) for stage in plan]
    outcome = execute(last, store, machines.launcher, on_event=lose, place=placer)
    outcome.raise_for_failures()
    assert len(outcome.complete) == 4
    assert placer.asked[0] == ["n-0", "n-1", "n-2", "n-3"]
    assert len(placer.asked) > 1
    places = {store.manifest(stage.address)["where"]["node_id"] for stage in last}
    assert places - {gone} == {machines.launcher.nodes()[0].id}


def test_a_node_that_is_drained_is_given_nothing_more(machines: Machines, store: Store) -> None:
    """Not even by way of the worker that is warm there."""
    where: dict[str, str] = {}

    def note(event: Event) -> None:
        if isinstance(event, StageStarted):
            where[event.stage.name] = event.where["node_id"]

    leaves = machines.add()
    execute([big("before", 1)], store, machines.launcher, on_event=note).raise_for_failures()
    machines.drain(leaves)
    stays = machines.add()
    assert leaves.node_id not in machines.ids()
    execute([big("after", 2)], store, machines.launcher, on_event=note).raise_for_failures()
    assert where == {"before": leaves.node_id, "after": stays.node_id}
