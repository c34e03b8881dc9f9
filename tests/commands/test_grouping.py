"""Which node groups a recipe asks for, on clusters that have groups, have others, or have none."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from m2mkd_ray.commands.clusters import nodes_of_file
from m2mkd_ray.commands.grouping import in_groups
from m2mkd_ray.execution.feasibility import Node, misfits
from m2mkd_ray.execution.node_groups import Autoscaler, NodeGroup
from m2mkd_ray.pipeline import plan
from m2mkd_ray.preflight import rank_problems
from m2mkd_ray.recipe import Recipe, override
from m2mkd_ray.recipes import find_recipe

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
HEAD = Node("head", {"CPU": 0.0}, labels={"m2mkd.node-group": "head"})


def groups(recipe: Recipe) -> dict[str, str]:
    """The group that each kind of work asks for."""
    placed = recipe.placement
    return {
        **{kind: getattr(placed, kind).resources.node_group for kind in ("models", "pairs", "evaluation")},
        "finetune": placed.finetune.node_group,
    }


def paper(*settings: str) -> Recipe:
    return override(find_recipe("vmoe_base"), settings)


def types(name: str, **of: float) -> NodeGroup:
    return NodeGroup(name, {key.upper(): amount for key, amount in of.items()}, 4, {"m2mkd.node-group": name})


OURS = {"models": "incubate", "pairs": "incubate", "evaluation": "incubate", "finetune": "finetune"}


@pytest.mark.parametrize("file", ["aws-spot.yaml", "kuberay/rayjob-spot.yaml", "onprem/nodes.yaml"])
def test_work_on_gpus_asks_for_its_group(file: str) -> None:
    placed = in_groups(paper(), nodes_of_file(CLUSTER / file))
    assert groups(placed) == OURS
    before, after = plan(paper()), plan(placed)
    assert [stage.address for stage in after] == [stage.address for stage in before]
    asked = {stage.name.split("-")[0]: stage.resources.group for stage in after}
    assert (asked["pair"], asked["teacher"], asked["finetune"]) == ("incubate", "incubate", "")  # it only drives
    assert {stage.placement.group.each.group for stage in after if stage.name == "finetune"} == {"finetune"}


@pytest.mark.parametrize("nodes", [[], [Node("laptop", {"CPU": 8.0, "GPU": 1.0})]])
def test_where_no_node_has_a_label_nothing_changes(nodes: Sequence[Node]) -> None:
    recipe = paper()
    assert in_groups(recipe, nodes) is recipe


def test_work_without_gpus_goes_anywhere() -> None:
    recipe = find_recipe("demo")
    assert in_groups(recipe, nodes_of_file(CLUSTER / "aws.yaml")) is recipe


def test_what_the_group_cannot_hold_goes_anywhere_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    recipe = paper("placement.pairs.resources.gpus=4", "placement.finetune.num_workers=32", "data.lanes=32")
    placed = in_groups(recipe, nodes_of_file(CLUSTER / "aws.yaml"))
    assert groups(placed) == {**OURS, "pairs": "", "finetune": ""}  # two nodes of eight GPUs
    assert "placement.pairs may be on any node: it asks for 12 CPUs, 4 GPUs, and group incubate cannot" in caplog.text
    assert "32 processes of 12 CPUs, 1 GPU, and group finetune cannot hold that" in caplog.text


def test_a_group_that_is_set_is_kept_and_so_is_none() -> None:
    recipe = paper("placement.pairs.resources.node_group=finetune", "placement.finetune.node_group=any")
    placed = in_groups(recipe, nodes_of_file(CLUSTER / "aws.yaml"))
    assert groups(placed) == {**OURS, "pairs": "finetune", "finetune": "any"}
    assert {stage.placement.group.each.group for stage in plan(placed) if stage.name == "finetune"} == {""}


def test_a_group_that_is_not_there_is_refused_with_those_that_are() -> None:
    nodes = nodes_of_file(CLUSTER / "aws.yaml")
    recipe = paper("placement.pairs.resources.node_group=gpu", "placement.finetune.node_group=big")
    stages = plan(in_groups(recipe, nodes))
    (of_pairs,) = misfits(stages, nodes)
    assert (
        "12 CPUs and 1 GPU on a node of group gpu, but there is none: the nodes are of cpu, finetune, inc" in of_pairs
    )
    (of_ranks,) = rank_problems(stages, nodes)
    assert "A rank of finetune asks for 12 CPUs and 1 GPU on a node of group big, but there is none" in of_ranks


def test_what_an_autoscaler_may_start_counts() -> None:
    grows = Autoscaler(True, (types("incubate", cpu=16, gpu=1), types("finetune", cpu=96, gpu=8)))
    assert groups(in_groups(paper(), [HEAD], grows)) == OURS


def test_groups_that_cannot_be_known_are_taken_to_be_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert groups(in_groups(paper(), [HEAD], Autoscaler(may_grow=True))) == OURS
    assert "if there is no such one, set placement.pairs.resources.node_group=any" in caplog.text


def test_an_autoscaler_that_reads_no_labels_is_asked_for_none(caplog: pytest.LogCaptureFixture) -> None:
    grows = Autoscaler(True, (types("incubate", cpu=16, gpu=1),), reads_labels=False)
    recipe = paper()
    assert in_groups(recipe, [HEAD], grows) is recipe
    in_groups(paper("placement.pairs.resources.node_group=incubate"), [HEAD], grows)
    assert "Start the head with RAY_enable_autoscaler_v2=1" in caplog.text
