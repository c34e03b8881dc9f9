"""`m2mkd run --placement auto` measures first, and no longer than it helps."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from m2mkd_ray.commands.measuring import measure_costs, placer_of
from m2mkd_ray.commands.placing import profiles
from m2mkd_ray.commands.session import chosen, planned
from m2mkd_ray.errors import PlanError
from m2mkd_ray.execution import LocalLauncher, StageContext, Store, execute
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.job import Job
from m2mkd_ray.execution.planning.planner import Planner
from m2mkd_ray.stages.profile import PROFILE, PairProfile, Profile

SMALL = Node("a", {"CPU": 2.0, "memory": 9e9}, id="1")
ON_GPUS = ["placement.pairs.resources={cpus: 1, gpus: 1}"]
L4 = Node("c", {"CPU": 2.0, "GPU": 1.0, "accelerator_type:L4": 1.0, "memory": 9e9}, id="3")
MORE_L4 = replace(L4, name="node type l4", id="")
H100 = Node("node type h100", {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100": 1.0, "memory": 9e9})
BIG = Node("b", {"CPU": 2.0, "memory": 9e9}, id="2", labels={"ray.io/node-group": "big"})


class OnNodes(LocalLauncher):
    """Runs in this process what is asked to be on nodes."""

    runs_in_process = False

    def __init__(self, *nodes: Node, may_come: Sequence[Node] | None = ()) -> None:
        """`may_come`: None: some may, and nobody knows which."""
        super().__init__()
        self._nodes, self._may_come = list(nodes), may_come

    def nodes(self) -> list[Node]:
        """See `Launcher`."""
        return self._nodes

    def may_grow(self) -> bool:
        """See `Launcher`."""
        return self._may_come is None or bool(self._may_come)

    def most_nodes(self) -> list[Node]:
        """See `Launcher`."""
        return list(self._may_come or self._nodes)


class Idle(OnNodes):
    """Is not to be given anything."""

    def submit(self, jobs: Sequence[Job], *arguments: Any, **options: Any) -> None:
        """See `Launcher`."""
        raise AssertionError(f"{jobs[0].name} was started")


def test_a_profile_whose_type_of_node_has_gone_is_given_up_and_the_others_are_measured(tiny, tmp_path, caplog) -> None:
    store = Store(str(tmp_path / "runs"))
    gone, there = profiles(planned(chosen(str(tiny), [])), [BIG, SMALL])
    measure_costs([gone, there], store, OnNodes(SMALL), wait_timeout_s=20.0)
    assert [store.status(stage.address).state for stage in (gone, there)] == ["absent", "complete"]
    assert (
        f"{gone.name} was not measured: it asks for room on a node with devices of type big, but those with room have "
        "cpu. FLOPs stand for it"
    ) in caplog.text


def _write(config: object, context: StageContext, profile: Profile) -> dict[str, float]:
    (context.out / PROFILE).write_text(json.dumps(profile.model_dump()))
    return {}


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory) -> Store:
    """A store in which a profile says that each pair needs 30 GB of an L4's memory, which has 24."""
    store = Store(str(tmp_path_factory.mktemp("measured")))
    (wanted,) = profiles(planned(chosen(str(tiny), ON_GPUS)), [L4])
    pair = PairProfile(
        seconds=0.1, prefix=0.01, teacher=0.01, student=0.05, suffix=0.03, memory_gb=30.0, occupancy=1.0
    )
    profile = Profile(device="L4", name="NVIDIA L4", decode=0.01, pairs=[pair] * wanted.config.blueprint.num_modules)
    execute([replace(wanted, run=partial(_write, profile=profile))], store, LocalLauncher()).raise_for_failures()
    return store


@pytest.mark.parametrize(
    ("may_come", "is_refused"),
    [((), True), ([MORE_L4], True), ([MORE_L4, H100], False), (None, False)],
    ids=["no nodes may come", "none with more memory", "some with more memory", "nobody knows which"],
)
def test_gpu_memory_that_no_node_has_is_refused_unless_one_may_come_that_has_it(
    tiny, measured, may_come: Sequence[Node] | None, is_refused: bool
) -> None:
    recipe = chosen(str(tiny), ON_GPUS)
    launcher = Idle(L4, may_come=may_come)
    if is_refused:
        with pytest.raises(PlanError, match="pair-0 asks for 30 GB of GPU memory, but no GPU has so much"):
            placer_of("auto", recipe, planned(recipe), measured, launcher)
    else:
        assert isinstance(placer_of("auto", recipe, planned(recipe), measured, launcher), Planner)


def test_what_fits_nowhere_is_refused_before_anything_is_measured(tiny, tmp_path) -> None:
    recipe = chosen(str(tiny), ON_GPUS)
    stages, store = planned(recipe), Store(str(tmp_path / "runs"))
    by_hand = tmp_path / "hand.yaml"
    by_hand.write_text("pair-0: {devices: 2}")
    with pytest.raises(PlanError, match="pair-0 asks for 2 devices of one node, but no node has so many"):
        placer_of(str(by_hand), recipe, stages, store, Idle(L4))
