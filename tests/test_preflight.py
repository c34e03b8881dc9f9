"""Checks that need more than one command line shows: several nodes, row groups, classes."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2mkd_ray import preflight
from m2mkd_ray.commands.session import chosen, planned
from m2mkd_ray.data import ClassName, find, import_data
from m2mkd_ray.data.importers.source import Sample, Source, SplitSource, png
from m2mkd_ray.data.importers.write import WriteConfig, write
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.recipe import Recipe

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


@pytest.mark.parametrize(("there", "room"), [((2,), 1), ((1, 1), 1), ((0.5, 2), 1)])
def test_the_driver_of_the_ranks_takes_room_too(there, room, tiny):
    settings = [*RANKS, "placement.finetune.cpus_per_worker=1", "placement.driver.cpus=1"]
    plan = planned(chosen(str(tiny), settings))
    (problem,) = preflight.rank_problems(plan, nodes(*there))
    assert f"there is room for {room}" in problem
    assert "of which its driver holds 1 CPUs). Lower placement.driver, " in problem
    assert preflight.rank_problems(plan, nodes(*there, 1)) == []


def test_a_finetuning_in_one_process_has_no_ranks(tiny):
    assert preflight.rank_problems(planned(chosen(str(tiny), [])), nodes(0)) == []


def test_row_groups_are_those_that_the_feed_deals_to_lanes():
    folder = find("fashion-mnist-small")
    assert preflight.row_groups(folder, "train", None) == [256] * 31 + [64]
    drawn = preflight.row_groups(folder, "train", 10)
    assert sum(drawn) == 10
    assert len(drawn) <= 10


def test_parts_of_a_split_are_apart_or_refused(tiny):
    parts = ["data.split=train[2000:]", "data.validation.split=train[:2000]"]
    assert preflight.problems(chosen(str(tiny), parts)) == []
    (problem,) = preflight.problems(chosen(str(tiny), ["data.split=train[1990:]", parts[1]]))
    assert "'train[:2000]' has 10 of the rows that are trained on (data.split 'train[1990:]')" in problem


def test_a_part_of_a_sorted_split_is_refused(tiny, tmp_path):
    """A split whose rows lie by class: the first of them are of one."""
    labels = np.repeat(np.arange(10), 60)
    images = np.zeros((600, 28, 28), np.uint8)

    def sample(number):
        return Sample(f"{number}.png", int(labels[number]), partial(png, images[number]))

    source = Source(
        classes=tuple(ClassName(id=str(label), name=str(label)) for label in range(10)),
        splits={"train": SplitSource(600, sample, shuffle=False)},
        licence="MIT",
        origin="a test",
    )
    write(source, tmp_path, WriteConfig(name="sorted", rows_per_group=64))
    settings = [
        "data.dataset=sorted", f"placement.data_root={tmp_path}", "data.max_rows=null",
        "data.split=train[100:]", "data.validation.split=train[:100]",
    ]  # fmt: skip
    (problem,) = preflight.problems(chosen(str(tiny), settings))
    assert "'train[:100]' of 'sorted' has images of 2 classes" in problem
    assert "sorted by class" in problem


def test_all_problems_are_found_at_once(tiny: Path):
    recipe = chosen(
        str(tiny),
        [
            "data.validation.split=val",
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


EXPERTS = "blueprint.student.vit.width"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([f"{EXPERTS}=18"], "width or hidden width is 18, but in fp32, the precision of pairs and finetune, "),
        ([f"{EXPERTS}=20", "pairs.precision=bf16"], "is 20, but in bf16, the precision of pairs, both "),
        ([f"{EXPERTS}=36", "finetune.precision=bf16"], "is 36, but in bf16, the precision of finetune, both "),
        ([f"{EXPERTS}=20", "blueprint.student.vit.mlp_ratio=1.5"], "is 30, but in fp32"),
    ],
)
def test_experts_that_cannot_be_multiplied_are_refused_before_anything_is_trained(settings, told, tiny):
    (problem,) = preflight.problems(chosen(str(tiny), settings))
    assert told in problem


def test_experts_of_whole_16_bytes_are_well(tiny):
    assert preflight.problems(chosen(str(tiny), [f"{EXPERTS}=20"])) == []
    assert preflight.problems(chosen(str(tiny), [f"{EXPERTS}=24", "pairs.precision=bf16"])) == []


NORMAL = "mean: [0.286, 0.286, 0.286], std: [0.353, 0.353, 0.353]"


@pytest.mark.parametrize(
    ("augmentation", "told"),
    [
        ("{kind: none}", "pairs.augmentation has mean (0.485, 0.456, 0.406), std "),
        (f"{{kind: timm, {NORMAL}}}", "has crop_pct 0.875, but evaluation and export read images by "),
        (f"{{kind: none, interpolation: bilinear, {NORMAL}}}", "Set interpolation to the same in both."),
    ],
)
def test_a_phase_that_sees_other_images_than_the_evaluation_is_refused(augmentation, told, tiny):
    (problem,) = preflight.problems(chosen(str(tiny), [f"pairs.augmentation={augmentation}"]))
    assert told in problem


def test_what_no_device_can_augment_is_refused_where_a_device_is_to(tiny):
    settings = [f"finetune.augmentation={{kind: timm, crop_pct: 1, auto_augment: rand-m9-t3a, {NORMAL}}}"]
    assert preflight.problems(chosen(str(tiny), [*settings, "placement.pairs.augment_on_device=true"])) == []
    (problem,) = preflight.problems(chosen(str(tiny), [*settings, "placement.finetune.augment_on_device=true"]))
    assert problem.startswith("finetune: auto_augment 'rand-m9-t3a' has GaussianBlur, which only Pillow can do; a ")


def test_a_phase_may_have_an_augmentation_of_its_own(tiny):
    augmentation = f"{{kind: timm, crop_pct: 1, {NORMAL}}}"
    assert preflight.problems(chosen(str(tiny), [f"pairs.augmentation={augmentation}"])) == []


def pretrained(tiny: Path, weights: object, *settings: str) -> Recipe:
    return chosen(str(tiny), ["teacher.source=pretrained", f"teacher.weights={weights}", *settings])


def test_pretrained_weights_want_the_images_that_they_were_trained_on(tiny, tmp_path):
    (problem,) = preflight.problems(pretrained(tiny, "timm"))
    assert "Set data.augmentation.mean=[0.5, 0.5, 0.5] and data.augmentation.std=[0.5, 0.5, 0.5]." in problem
    normal = ["data.augmentation.mean=[0.5, 0.5, 0.5]", "data.augmentation.std=[0.5, 0.5, 0.5]"]
    assert preflight.problems(pretrained(tiny, "timm", *normal)) == []
    file = tmp_path / "deit.pth"
    file.write_bytes(b"weights")
    assert preflight.problems(pretrained(tiny, file)) == []
    (warning,) = preflight.warnings(pretrained(tiny, file))
    assert "mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5], but data.augmentation has mean [0.286, " in warning
    assert preflight.warnings(pretrained(tiny, file, *normal)) == preflight.warnings(chosen(str(tiny), [])) == []


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
