"""The plan as data: its shape, what recipes share, and what a changed setting runs again."""

import hashlib
import inspect
import json
from pathlib import Path

import pytest

from m2mkd_ray import pipeline
from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.data import Augmentation
from m2mkd_ray.execution import Stage
from m2mkd_ray.models.compute import hybrid_flops
from m2mkd_ray.pipeline import plan, variant
from m2mkd_ray.recipe import Data, Pairs, Phase, Recipe, Teacher, override
from m2mkd_ray.recipes import baseline, find_recipe
from m2mkd_ray.slices import images
from m2mkd_ray.stages.parts import Validation

SIZE = {"name": "vit_tiny_patch16_224", "img_size": 28, "patch_size": 7, "num_classes": 10, "num_heads": 2}
PHASE = Phase(epochs=3, lr=1e-3, batch_size=64)
TEACHERS = {
    "incubated": Teacher(source="incubated", incubation=PHASE, phase=PHASE),
    "trained": Teacher(source="trained", phase=PHASE),
    "pretrained": Teacher(source="pretrained", weights="timm", tune="head", phase=PHASE),
}


@pytest.fixture
def recipe() -> Recipe:
    """Three pairs, the paper's kind of teacher, no baselines."""
    return Recipe(
        name="small",
        title="m2mKD",
        data=Data(
            dataset="fashion-mnist-small",
            validation=Validation(split="test"),
            lanes=2,
            augmentation=Augmentation(kind="light"),
        ),
        blueprint=Blueprint(
            teacher=Vit(width=16, depth=5, **SIZE),
            teacher_depths=(1, 2, 2),
            student=Student(vit=Vit(width=12, depth=3, **SIZE), moe=Moe(num_experts=3)),
            student_depths=(1, 1, 1),
        ),
        meta=PHASE,
        teacher=TEACHERS["incubated"],
        pairs=Pairs(**PHASE.model_dump()),
        finetune=PHASE,
        suites=("fashion-small", "fashion-small-corrupted"),
    )


def with_teacher(recipe: Recipe, source: str) -> Recipe:
    return recipe.model_copy(update={"teacher": TEACHERS[source]})


def graph(stages: list[Stage]) -> dict[str, set[str]]:
    """Names of what each stage reads; the suites' data are called `data` too."""
    return {stage.name: {need.name for need in stage.needs.values()} for stage in stages}


def addresses(recipe: Recipe) -> set[str]:
    return {stage.address for stage in plan(recipe)}


PAIRS = {"pair-0", "pair-1", "pair-2"}
EVALUATIONS = {"evaluate-meta", "evaluate-hybrids", "evaluate-student", "evaluate-teacher"}
REPORTED = {"data", "meta", "teacher", "finetune", *PAIRS, *EVALUATIONS}
BEHIND_THE_TEACHER = {
    "data": set(),
    "meta": {"data"},
    "split": {"teacher"},
    **{name: {"data", "meta", "split"} for name in PAIRS},
    "assemble": PAIRS,
    "finetune": {"data", "assemble"},
    "evaluate-meta": {"data", "meta"},
    "evaluate-teacher": {"data", "teacher"},
    "evaluate-hybrids": {"data", "meta", *PAIRS},
    "evaluate-student": {"data", "finetune"},
    "export": {"data", "finetune", "evaluate-student"},
}
INCUBATED = {"incubate-0", "incubate-1", "incubate-2"}
SHAPES = {
    "incubated": {
        **BEHIND_THE_TEACHER,
        **{name: {"data", "meta"} for name in INCUBATED},
        "assemble-teacher": INCUBATED,
        "teacher": {"data", "assemble-teacher"},
        "report": REPORTED | INCUBATED,
    },
    "trained": {**BEHIND_THE_TEACHER, "teacher": {"data"}, "report": REPORTED},
    "pretrained": {**BEHIND_THE_TEACHER, "teacher": {"data"}, "report": REPORTED},
}


@pytest.mark.parametrize("source", SHAPES)
def test_the_plan_is_the_flow_of_the_design(source: str, recipe: Recipe) -> None:
    assert graph(plan(with_teacher(recipe, source))) == SHAPES[source]


def test_a_stage_stands_after_all_that_it_reads_and_only_once(recipe: Recipe) -> None:
    stages = plan(override(recipe, ["baselines=[pure, incubation, pure_matched]"]))
    seen: set[str] = set()
    for stage in stages:
        assert {need.address for need in stage.needs.values()} <= seen
        assert stage.address not in seen
        seen.add(stage.address)


def test_without_alpha_there_is_no_teacher(recipe: Recipe) -> None:
    found = graph(plan(override(recipe, ["pairs.distill.alpha=0"])))
    gone = {"teacher", "split", "evaluate-teacher", "assemble-teacher", *INCUBATED}
    expected = {name: needs - gone for name, needs in SHAPES["incubated"].items() if name not in gone}
    assert found == expected


def test_from_scratch_there_is_only_the_student(recipe: Recipe) -> None:
    assert graph(plan(baseline(recipe, "pure"))) == {
        "data": set(),
        "finetune": {"data"},
        "evaluate-student": {"data", "finetune"},
        "report": {"data", "finetune", "evaluate-student"},
        "export": {"data", "finetune", "evaluate-student"},
    }


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("pure", {"finetune", "evaluate-student"}),
        ("pure_matched", {"finetune", "evaluate-student"}),
        ("incubation", {*PAIRS, "finetune", "evaluate-hybrids", "evaluate-student"}),
    ],
)
def test_a_baseline_shares_all_that_it_does_not_change(name: str, own: set[str], recipe: Recipe) -> None:
    of_recipe, of_baseline = variant(recipe), variant(baseline(recipe, name))
    shared = {role for role, stage in of_baseline.items() if stage.address == of_recipe[role].address}
    assert set(of_baseline) - shared == own


def test_the_report_reads_baselines_by_their_names_and_titles(recipe: Recipe) -> None:
    *_, report, _ = plan(override(recipe, ["baselines=[pure, incubation]"]))
    assert {role.rpartition("/")[0] for role in report.needs} == {"", "pure", "incubation"}
    assert report.config.titles == {"pure": "pure", "incubation": "incubation (no teacher)"}
    assert report.needs["pure/finetune"].of == "small/pure"


def test_recipes_that_agree_on_a_slice_share_the_stage(recipe: Recipe) -> None:
    other = override(recipe, ["name=other", "title=other", "pairs.distill.alpha=0.9"])
    ours, theirs = variant(recipe), variant(other)
    same = {role for role in ours if ours[role].address == theirs[role].address}
    assert same == {"data", "meta", "teacher", *INCUBATED, "evaluate-meta", "evaluate-teacher"}


ENDS = {"report", "export"}
STUDENT = {"finetune", "evaluate-student", *ENDS}
FROM_PAIRS = {*PAIRS, "assemble", "evaluate-hybrids", *STUDENT}
FROM_TEACHER = {"teacher", "evaluate-teacher", "split", *FROM_PAIRS}
FROM_INCUBATION = {*INCUBATED, "assemble-teacher", *FROM_TEACHER}
ALL = {"meta", "evaluate-meta", *FROM_INCUBATION}
RUNS_AGAIN = {
    "seed=1": ALL,
    "data.max_rows=500": ALL,
    "data.augmentation.hflip=0": ALL,
    "data.validation.max_rows=100": ALL,
    "blueprint.teacher.mlp_ratio=2": ALL,
    "meta.epochs=4": ALL,
    "teacher.incubation.lr=1e-4": FROM_INCUBATION,
    "teacher.phase.batch_size=32": FROM_TEACHER,
    "blueprint.student.moe.num_experts=4": FROM_PAIRS,
    "blueprint.student.vit.width=14": FROM_PAIRS,
    "pairs.lr=1e-4": FROM_PAIRS,
    "pairs.distill.alpha=0.9": FROM_PAIRS,
    "pairs.distill.reduction=batchmean": FROM_PAIRS,
    "pairs.augmentation={kind: none}": FROM_PAIRS,
    "keep_stitches=true": {"assemble", *STUDENT},
    "finetune.clip_norm=1.0": STUDENT,
    "finetune.precision=bf16": STUDENT,  # every other network is evaluated as it was trained itself
    "suites=[fashion-small]": {*EVALUATIONS, *ENDS},
    "suites=[fashion-small-corrupted, fashion-small]": {*EVALUATIONS, *ENDS},
    "baselines=[pure]": STUDENT - {"export"},  # pure's own, and what tells of them
    "title=another": ENDS,
    "name=another": ENDS,
}


@pytest.mark.parametrize("setting", RUNS_AGAIN)
def test_a_changed_setting_runs_again_exactly_what_lies_below_it(setting: str, recipe: Recipe) -> None:
    before = addresses(recipe)
    again = {stage.name for stage in plan(override(recipe, [setting])) if stage.address not in before}
    assert again == RUNS_AGAIN[setting]


@pytest.mark.parametrize(
    "setting",
    [
        "placement.data_root=elsewhere",
        "placement.models.resources.gpus=1",
        "placement.models.micro_batch=8",
        "placement.pairs.resources={cpus: 2, gpus: 0.25, memory_gb: 4}",
        "placement.pairs.checkpoint_every_s=0",
        "placement.pairs.data_workers=3",
        "placement.pairs.log_every_steps=1",
        "placement.finetune.engine=torch",
        "placement.finetune.num_workers=1",
        "placement.finetune.cpus_per_worker=4",
        "placement.finetune.gpus_per_worker=1",
        "placement.finetune.deepspeed.zero_stage=2",
        "placement.finetune.max_failures=9",
        "placement.evaluation.resources.cpus=2",
        "placement.light.cpus=1",
        "placement.driver.cpus=1",
    ],
)
def test_where_and_how_fast_it_runs_runs_nothing_again(setting: str, recipe: Recipe) -> None:
    placed = override(recipe, [setting])
    assert placed.placement != recipe.placement
    assert addresses(placed) == addresses(recipe)


def test_no_placement_is_in_a_key(recipe: Recipe) -> None:
    """The settings above are examples; a setting of a placement that is new must not slip into a config either."""
    for stage in plan(recipe):
        assert "placement" not in stage.config.model_dump_json()


def test_the_control_without_a_teacher_does_not_depend_on_how_the_teacher_would_have_taught(recipe: Recipe) -> None:
    other = override(recipe, ["pairs.distill.temperature=4", "pairs.distill.kind=hard"])
    assert addresses(baseline(other, "incubation")) - addresses(baseline(recipe, "incubation")) == {
        stage.address for stage in plan(baseline(other, "incubation")) if stage.name in ENDS
    }


def test_other_pretrained_weights_in_the_same_file_are_another_teacher(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    teacher = TEACHERS["pretrained"].model_copy(update={"weights": str(file)})
    keys = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        keys.append(variant(recipe.model_copy(update={"teacher": teacher}))["teacher"].key)
    assert keys[0] != keys[1]


def test_without_the_data_set_a_plan_can_be_looked_at(recipe: Recipe) -> None:
    missing = override(recipe, ["data.dataset=imagenet-1k"])
    assert variant(missing)["data"].config.fingerprint is None
    assert variant(recipe)["data"].config.fingerprint is not None


def test_a_torch_fine_tuning_gets_the_resources_of_a_training(recipe: Recipe) -> None:
    placed = override(recipe, ["placement.models.resources.cpus=3", "placement.finetune.engine=torch"])
    assert variant(placed)["finetune"].resources.cpus == 3
    assert variant(recipe)["finetune"].resources == recipe.placement.driver


def test_the_whole_flow_can_be_read_in_one_sitting() -> None:
    assert len(inspect.getsource(pipeline).splitlines()) < 100


def test_writing_logits_is_one_process_whose_operations_are_known(recipe: Recipe) -> None:
    settings = ["pairs.views=3", "pairs.cache={kind: float32}", "placement.pairs.ranks=2"]
    stages = {stage.name: stage for stage in plan(override(recipe, settings))}
    logits = [stage for name, stage in stages.items() if name.startswith("logits-")]
    assert logits
    for stage in logits:
        assert stage.placement.ranks == 1  # type: ignore[attr-defined]  # a pair's placement
        rows = images(recipe, recipe.pairs) / recipe.pairs.epochs
        of_image = hybrid_flops(recipe.blueprint, stage.config.index)  # type: ignore[attr-defined]
        assert stage.flops == pytest.approx(3 * rows * of_image)


# Single pairs with settings of their own


def test_a_pairs_own_settings_change_its_stage_and_what_is_below_alone(recipe: Recipe) -> None:
    own = override(recipe, ["pairs.of.1.temperature=3", "pairs.of.1.lr=0.002"])
    of_all = override(recipe, ["pairs.distill.temperature=3", "pairs.lr=0.002"])
    before, after, all_after = variant(recipe), variant(own), variant(of_all)
    assert after["pair-1"].address == all_after["pair-1"].address
    changed = {role for role in before if before[role].address != after[role].address}
    assert changed == {"pair-1", "finetune", "evaluate-hybrids", "evaluate-student"}


def test_a_pair_without_a_teacher_beside_others_is_the_controls(recipe: Recipe) -> None:
    own, control = override(recipe, ["pairs.of.0.alpha=0"]), baseline(recipe, "incubation")
    assert variant(own)["pair-0"].address == variant(control)["pair-0"].address
    assert "split" not in variant(own)["pair-0"].needs
    assert "split" in variant(own)["pair-1"].needs


def test_the_control_without_a_teacher_has_none_in_any_pair(recipe: Recipe) -> None:
    control = baseline(override(recipe, ["pairs.of.0.alpha=0.9"]), "incubation")
    assert not control.distills
    assert variant(control)["pair-0"].address == variant(baseline(recipe, "incubation"))["pair-0"].address


def test_one_pair_with_a_teacher_is_enough_for_there_to_be_one(recipe: Recipe) -> None:
    one = override(recipe, ["pairs.distill.alpha=0", "pairs.of.1.alpha=0.5"])
    assert "teacher" in variant(one)
    assert "logits-0" not in variant(override(one, ["pairs.views=2", "pairs.cache={kind: float32}"]))


CONFIGS = {
    "pair-0": "865827ef27c8",
    "pair-3": "05ee727e3130",
    "evaluate-hybrids": "0a0b605595e6",
    "report": "dfdc35c5589c",
    "export": "6e244c4776b7",
}
"""Of vmoe_base, from before there were settings of single pairs."""


def test_configs_of_recipes_without_such_settings_stay() -> None:
    """Keys are made from them; a stage's version, which the key has too, may be raised for other reasons."""
    configs = {stage.name: stage.config for stage in plan(override(find_recipe("vmoe_base"), ["baselines=[]"]))}
    dumps = {name: json.dumps(configs[name].model_dump(mode="json"), sort_keys=True) for name in CONFIGS}
    assert {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in dumps.items()} == CONFIGS
