"""Checks that need more than one command line shows: several nodes, row groups, classes."""

from pathlib import Path

import pytest
from PIL import Image

from m2mkd_ray import preflight
from m2mkd_ray.commands.session import chosen, planned
from m2mkd_ray.data import find, import_data
from m2mkd_ray.execution.feasibility import Node

RANKS = ["placement.finetune.engine=deepspeed", "placement.finetune.num_workers=2"]


def nodes(*cpus: float) -> list[Node]:
    return [Node(f"node{i}", {"CPU": amount, "GPU": 0.0}) for i, amount in enumerate(cpus)]


@pytest.mark.parametrize("there", [(4,), (2, 2), (1, 3)])
def test_ranks_may_be_on_several_nodes(there, tiny):
    plan = planned(chosen(str(tiny), [*RANKS, "placement.finetune.cpus_per_worker=1"]))
    assert preflight.rank_problems(plan, nodes(*there)) == []


@pytest.mark.parametrize(("there", "room"), [((3,), 1), ((1.5, 1.5), 0), ((2, 1), 1)])
def test_a_rank_is_never_split_between_nodes(there, room, tiny):
    plan = planned(chosen(str(tiny), [*RANKS, "placement.finetune.cpus_per_worker=2"]))
    (problem,) = preflight.rank_problems(plan, nodes(*there))
    assert f"2 ranks of 2 CPUs each, but there is room for {room}" in problem


def test_a_finetuning_in_one_process_has_no_ranks(tiny):
    assert preflight.rank_problems(planned(chosen(str(tiny), [])), nodes(0)) == []


def test_row_groups_are_those_that_the_feed_deals_to_lanes():
    folder = find("fashion-mnist-small")
    assert preflight.row_groups(folder, "train", None) == [256] * 31 + [64]
    drawn = preflight.row_groups(folder, "train", 10)
    assert sum(drawn) == 10
    assert len(drawn) <= 10


def test_all_problems_are_found_at_once(tiny: Path):
    recipe = chosen(
        str(tiny),
        [
            "data.validation.split=validation",
            "meta.batch_size=512",
            "blueprint.student.moe.blocks=[5]",
            "teacher.source=pretrained",
            "teacher.weights=gone.pth",
        ],
    )
    assert [text.split()[0] for text in preflight.problems(recipe)] == [
        "Data",
        "meta.batch_size",
        "Cannot",
        "teacher.weights:",
    ]


def test_more_lanes_than_row_groups_are_refused(tiny):
    batches = [f"{phase}.batch_size=64" for phase in ("meta", "teacher.phase", "pairs", "finetune")]
    recipe = chosen(str(tiny), ["data.lanes=64", "data.max_rows=64", *batches])
    (problem,) = preflight.problems(recipe)
    assert "data.lanes 64 is more than the" in problem


def test_a_suite_of_other_classes_is_refused(tiny, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pets" / "test" / name / "1.png")
    import_data("image-folder", tmp_path / "pets", "digits", tmp_path / "data")
    recipe = chosen(str(tiny), [f"placement.data_root={tmp_path / 'data'}", "suites=[fashion-small, digits]"])
    (problem,) = preflight.problems(recipe)
    assert "Suite 'digits' has images of 2 classes that the model was not trained on: cat, dog" in problem


def test_a_second_node_needs_the_data_too(tiny, tmp_path):
    recipe = chosen(str(tiny), [f"placement.data_root={tmp_path}"])
    assert preflight.cluster_warnings(recipe, nodes(4)) == []
    (warning,) = preflight.cluster_warnings(recipe, nodes(4, 4))
    assert str(tmp_path) in warning
