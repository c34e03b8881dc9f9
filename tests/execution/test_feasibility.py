"""Requests that no node can hold are named before anything waits for them."""

from toy import Number, add

from m2mkd_ray.execution import Resources, Stage
from m2mkd_ray.execution.feasibility import Node, lack, misfits
from m2mkd_ray.execution.given import Gathering
from m2mkd_ray.execution.placement import View
from m2mkd_ray.execution.planning.fleet import devices_for

NODES = [Node("small", {"CPU": 2.0, "memory": 8e9}), Node("gpu", {"CPU": 4.0, "GPU": 1.0, "memory": 16e9})]


def stage(name: str, **resources: float) -> Stage:
    return Stage(name, add, Number(), resources=Resources(**resources))


def test_what_fits_a_node_is_no_problem() -> None:
    assert misfits([stage("a"), stage("b", cpus=4, gpus=0.5, memory_gb=16)], NODES) == []


def test_resources_of_two_nodes_do_not_add_up() -> None:
    (problem,) = misfits([stage("a", cpus=6)], NODES)
    assert "a asks for 6 CPUs, but no node has so much: the most on one of 2 is 4 CPUs" in problem


def test_a_missing_gpu_is_named() -> None:
    (problem,) = misfits([stage("pair-0", cpus=1, gpus=1)], NODES[:1])
    assert "pair-0 asks for 1 CPU and 1 GPU" in problem
    assert "2 CPUs and 0 GPUs" in problem


def test_stages_of_the_same_request_share_a_sentence() -> None:
    (problem,) = misfits([stage(f"pair-{i}", gpus=2) for i in range(5)], NODES)
    assert problem.startswith("pair-0, pair-1, pair-2 and 2 more ask for")


def test_fractions_above_one_gpu_are_refused() -> None:
    (problem,) = misfits([stage("a", gpus=1.5)], NODES)
    assert "1.5 GPUs, but above one GPU Ray gives only whole ones" in problem


def test_no_nodes_at_all_is_said() -> None:
    (problem,) = misfits([stage("a")], [])
    assert "there are no nodes" in problem


IN_GROUPS = [
    Node("a", {"CPU": 4.0, "GPU": 1.0}, labels={"m2mkd.node-group": "incubate"}),
    Node("b", {"CPU": 64.0, "GPU": 8.0}, labels={"m2mkd.node-group": "finetune"}),
]


def test_only_nodes_of_the_group_that_is_asked_for_count() -> None:
    small = Resources(cpus=1, gpus=1, node_group="incubate")
    assert lack(small, IN_GROUPS) is None
    assert lack(Resources(cpus=1, gpus=4), IN_GROUPS) is None
    assert lack(Resources(cpus=1, gpus=4, node_group="any"), IN_GROUPS) is None
    assert lack(Resources(cpus=1, gpus=4, node_group="incubate"), IN_GROUPS) == (
        "1 CPU and 4 GPUs on a node of group incubate, but none of these has so much: the most on one of 1 is "
        "4 CPUs and 1 GPU. Lower the stages' resources or add a larger node."
    )
    assert lack(small, NODES) == (
        "1 CPU and 1 GPU on a node of group incubate, but there is none: no node has the label m2mkd.node-group."
    )


def test_devices_and_seats_are_those_of_the_group() -> None:
    request = Resources(cpus=1, gpus=1, node_group="incubate")
    assert [device.node for device in devices_for(request, IN_GROUPS, [])] == ["a"]
    stages = [
        Stage(name, add, Number(), resources=request, together=lambda members: iter(()), mates=name, cohort=2)
        for name in ("x", "y")
    ]
    (seat,) = Gathering().seats(stages, View(IN_GROUPS))  # the other one waits, though `b` has eight free
    assert seat.resources.group == "incubate"
