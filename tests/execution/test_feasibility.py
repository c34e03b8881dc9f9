"""Requests that no node can hold are named before anything waits for them."""

from toy import Number, add

from m2mkd_ray.execution import Resources, Stage
from m2mkd_ray.execution.feasibility import Node, misfits

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
