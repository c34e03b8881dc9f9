"""Real pairs on a cluster that grows and shrinks under them, and whose nodes die or are drained: the same bits."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from autoscaling import Autoscaling, kill_node, wait_until, workers
from ray._private.state import actors
from small import hashes, small_demo

from m2mkd_ray.commands.grouping import in_groups
from m2mkd_ray.commands.watching import cluster_now
from m2mkd_ray.errors import PlanError
from m2mkd_ray.execution import (
    Event,
    LocalLauncher,
    StageProgress,
    StageRetried,
    StageStarted,
    Store,
    check,
    execute,
    in_order,
    plan_status,
)
from m2mkd_ray.execution.ahead import Ahead
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.nodes import nodes_now
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.execution.runs import Run, State
from m2mkd_ray.pipeline import plan
from m2mkd_ray.preflight import holds
from m2mkd_ray.recipe import Recipe

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]

PAIRS = ("pair-0", "pair-1", "pair-2", "pair-3")
FILE = "module.safetensors"
ON_GPUS = "placement.pairs.resources={cpus: 1, gpus: 1}"
TWO = ("pair-0", "pair-1")
"""As many as a node holds."""
DEADLINE_S = 30
IDLE_MINUTES = 0.1
"""After which an idle node is taken away."""

HINTER = """
import sys, time
from m2mkd_ray.execution import Resources
from m2mkd_ray.execution.ray_launcher import RayLauncher
launcher = RayLauncher(sys.argv[1])
assert launcher.may_request()
launcher.request([Resources(cpus=3, gpus=3, node_group="finetune")])
time.sleep(300)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The pairs of the small demo, trained one after another in this process."""
    store = Store(str(tmp_path_factory.mktemp("undisturbed")))
    execute(plan(small_demo()), store, LocalLauncher(), until=PAIRS).raise_for_failures()
    return store


@pytest.fixture
def store(undisturbed: Store, tmp_path: Path) -> Store:
    """What the pairs read."""
    shutil.copytree(undisturbed.root, tmp_path / "store", ignore=shutil.ignore_patterns("pair-*", ".*"))
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaling]:
    """A head without GPUs, up to three nodes with two each, and a large one that is not for pairs."""
    with tempfile.TemporaryDirectory(prefix="m2-", ignore_cleanup_errors=True) as folder:
        types = {"incubate": ({"CPU": 2, "GPU": 2}, 3), "finetune": ({"CPU": 3, "GPU": 3}, 1)}
        cluster = Autoscaling(Path(folder), types, idle_minutes=IDLE_MINUTES)
        yield cluster
        cluster.close()


@pytest.fixture
def launcher(cluster: Autoscaling) -> Iterator[RayLauncher]:
    launcher = RayLauncher(cluster.address, keep_idle_s=2)
    yield launcher
    launcher.close()


class Watcher:
    """Does something once, when a stage has reported a step; notes where stages started and what was retried."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step
        self.where: dict[str, list[str]] = {}
        self.retried: dict[str, str] = {}
        self.done_at: float | None = None
        self.left_at: dict[str, float] = {}
        self.seen: dict = {}
        """The cluster when that was done."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.where.setdefault(event.stage.name, []).append(event.where["node_id"])
        if isinstance(event, StageRetried):
            self.retried[event.stage.name] = str(event.kind)
            self.left_at[event.stage.name] = time.monotonic()
        is_due = isinstance(event, StageProgress) and event.stage.name == self.stage and self.done_at is None
        if is_due and event.progress.step >= self.step:
            self.act(event)
            self.done_at = time.monotonic()

    def act(self, event: StageProgress) -> None:
        raise NotImplementedError


class NodeKiller(Watcher):
    """Kills the stage's node; sees the cluster before."""

    def __init__(self, stage: str, step: int, look: Callable[[], dict]) -> None:
        super().__init__(stage, step)
        self.look = look

    def act(self, event: StageProgress) -> None:
        self.seen = self.look()
        kill_node(event.progress.pid)


class Drainer(Watcher):
    """Drains the stage's node; sees the cluster then."""

    def __init__(self, cluster: Autoscaling, stage: str, step: int) -> None:
        super().__init__(stage, step)
        self.cluster = cluster

    def act(self, event: StageProgress) -> None:
        self.cluster.drain(self.where[self.stage][0], DEADLINE_S)
        self.seen = {node.id: node for node in nodes_now()}


def attempts_of(store: Store, name: str) -> list[dict]:
    (pair,) = (stage for stage in plan(small_demo()) if stage.name == name)
    return store.manifest(pair.address)["attempts"]


def grouped(launcher: RayLauncher, *settings: str) -> Recipe:
    """The small demo with its pairs on GPUs, as it is placed on the cluster."""
    return in_groups(small_demo(ON_GPUS, *settings), launcher.nodes(), launcher.autoscaler)


def large(launcher: RayLauncher) -> list[Node]:
    """The nodes of the group that is not for pairs."""
    return [node for node in launcher.nodes() if node.labels.get("m2mkd.node-group") == "finetune"]


def alive_actors() -> list[str]:
    """Classes of the actors that are not dead, of all drivers."""
    return [actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"]


def test_nodes_come_for_the_pairs_one_that_dies_is_replaced_and_all_go(
    cluster: Autoscaling, launcher: RayLauncher, undisturbed: Store, store: Store
) -> None:
    assert workers() == set()
    assert launcher.may_grow()
    recipe = grouped(launcher)
    assert recipe.placement.pairs.resources.node_group == "incubate"
    killer = NodeKiller("pair-0", 2, lambda: cluster_now(cluster.address, plan_status(plan(recipe), store)))
    execute(plan(recipe), store, launcher, until=PAIRS, on_event=killer).raise_for_failures()
    assert killer.done_at is not None
    lost, again = killer.where["pair-0"]
    assert again != lost
    assert len({nodes[0] for nodes in killer.where.values()}) == 2
    on_lost = {name for name in PAIRS if killer.where[name][0] == lost}
    assert killer.retried.keys() == on_lost
    for name in on_lost:
        assert [attempt["outcome"] for attempt in attempts_of(store, name)] == ["LOST", "COMPLETE"]
    assert hashes(store, recipe, set(PAIRS), FILE) == hashes(undisturbed, recipe, set(PAIRS), FILE)
    head, *others = killer.seen["nodes"]
    assert (head["group"], head["runs"]) == ("", [])
    assert {(node["group"], node["spot"]) for node in others} == {("incubate", True)}
    assert "pair-0" in next(node["runs"] for node in others if node["id"] == lost)
    assert all(attempt["where"]["node_group"] == "incubate" for attempt in attempts_of(store, "pair-0"))
    ever = [node["Labels"].get("m2mkd.node-group") for node in ray.nodes()]  # those that are gone too
    assert "incubate" in ever
    assert "finetune" not in ever
    # Its workers are idle, and are ended by whoever asks for what happened.
    wait_until(lambda: not launcher.poll(0.1) and not workers(), 90, workers)


def test_pairs_leave_a_node_that_is_drained_with_a_checkpoint_and_at_no_cost(
    cluster: Autoscaling, launcher: RayLauncher, undisturbed: Store, store: Store
) -> None:
    never = "placement.pairs.checkpoint_every_s=1e6"  # so that a checkpoint can only be that of the notice
    recipe, drainer = grouped(launcher, never), Drainer(cluster, "pair-0", step=2)
    execute(plan(recipe), store, launcher, until=TWO, on_event=drainer).raise_for_failures()
    assert drainer.done_at is not None
    drained, again = drainer.where["pair-0"]
    assert again != drained
    assert drainer.seen[drained].leaves_in_s is not None
    assert 0 < drainer.seen[drained].leaves_in_s <= DEADLINE_S
    leavers = {name for name in TWO if drainer.where[name][0] == drained}
    assert "pair-0" in drainer.retried
    assert set(drainer.retried.values()) == {"PREEMPTED"}
    assert drainer.retried.keys() <= leavers  # one may have come to its end just before
    assert all(at - drainer.done_at < DEADLINE_S for at in drainer.left_at.values())
    for name in drainer.retried:
        first, last = attempts_of(store, name)
        assert (first["outcome"], last["outcome"]) == ("PREEMPTED", "COMPLETE")
        assert first["lost_steps"] == 0
    assert hashes(store, recipe, set(TWO), FILE) == hashes(undisturbed, recipe, set(TWO), FILE)


def test_a_pair_that_no_node_group_can_hold_is_refused_with_their_list(launcher: RayLauncher, store: Store) -> None:
    recipe = small_demo("placement.pairs.resources={cpus: 1, gpus: 4}")
    with pytest.raises(PlanError, match=r"4 GPUs.*[\s\S]*Node groups: .*incubate \(2 CPUs, 2 GPUs, up to 3 nodes\)"):
        check(plan(recipe), store, launcher)


def test_the_next_stages_nodes_come_before_it_is_ready_and_go_when_nobody_hints(
    launcher: RayLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    """Pairs are about to end; two ranks come next, and ask for the large node."""
    stages = in_order(plan(small_demo("placement.finetune.node_group=finetune")))
    runs = {stage.address: Run(stage, State.COMPLETE) for stage in stages}
    for run in runs.values():
        if run.stage.name in PAIRS:
            run.state, run.started = State.RUNNING, time.monotonic()
        elif run.stage.name in ("assemble", "finetune"):
            run.state = State.WAITING
    ahead = Ahead(launcher.request, 300, holds)
    ahead.look(runs, dict.fromkeys(PAIRS, 60.0))

    wait_until(lambda: len(large(launcher)) == 1, 60, launcher.nodes)
    ahead.end()
    wait_until(lambda: not large(launcher) and not alive_actors(), 60, launcher.nodes)
    assert "could not be asked" not in caplog.text


def test_nodes_that_a_killed_driver_had_hinted_at_go_as_idle_ones_and_no_actor_stays(
    cluster: Autoscaling, launcher: RayLauncher
) -> None:
    driver = subprocess.Popen([sys.executable, "-c", HINTER, cluster.address])
    try:
        wait_until(lambda: len(large(launcher)) == 1, 60, cluster.log.read_text)
        time.sleep(2 * 60 * IDLE_MINUTES)
        assert len(large(launcher)) == 1, "without a hint it would be gone by now"
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not workers(), 60, launcher.nodes)
    assert not alive_actors()
