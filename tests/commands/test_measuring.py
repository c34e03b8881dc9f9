"""`m2mkd run --placement auto` measures first, and no longer than it helps."""

from m2mkd_ray.commands.measuring import measure_costs
from m2mkd_ray.commands.placing import profiles
from m2mkd_ray.commands.session import chosen, planned
from m2mkd_ray.execution import LocalLauncher, Store
from m2mkd_ray.execution.feasibility import Node

SMALL = Node("a", {"CPU": 2.0, "memory": 9e9}, id="1")
BIG = Node("b", {"CPU": 2.0, "memory": 9e9}, id="2", labels={"ray.io/node-group": "big"})


class OnNodes(LocalLauncher):
    """Runs in this process what is asked to be on nodes."""

    runs_in_process = False

    def __init__(self, *nodes: Node) -> None:
        super().__init__()
        self._nodes = list(nodes)

    def nodes(self) -> list[Node]:
        """See `Launcher`."""
        return self._nodes


def test_a_profile_whose_type_of_node_has_gone_is_given_up_and_the_others_are_measured(tiny, tmp_path, caplog) -> None:
    store = Store(str(tmp_path / "runs"))
    gone, there = profiles(planned(chosen(str(tiny), [])), [BIG, SMALL])
    measure_costs([gone, there], store, OnNodes(SMALL), wait_timeout_s=20.0)
    assert [store.status(stage.address).state for stage in (gone, there)] == ["absent", "complete"]
    assert (
        f"{gone.name} was not measured: it asks for room on a node with devices of type big, but those with room have "
        "cpu. FLOPs stand for it"
    ) in caplog.text
