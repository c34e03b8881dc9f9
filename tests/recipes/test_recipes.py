"""Contracts over the tables, the published recipe's numbers, and that recipe run at an eighth of its width."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from m2mkd_ray.data import DATASETS
from m2mkd_ray.data.augment import IMAGENET
from m2mkd_ray.data.importers.digits import DigitsOptions, open_digits
from m2mkd_ray.data.importers.write import WriteConfig, write
from m2mkd_ray.errors import UsageError
from m2mkd_ray.evaluation import SUITES
from m2mkd_ray.execution import LocalLauncher, Store, execute
from m2mkd_ray.models.compute import pair_cost, student_macs
from m2mkd_ray.pipeline import plan, variant
from m2mkd_ray.recipe import Phase, Recipe, override
from m2mkd_ray.recipes import BASELINES, RECIPES, baseline, find_recipe
from m2mkd_ray.recipes.baselines import matched_factor

every_recipe = pytest.mark.parametrize("name", RECIPES)
every_baseline = pytest.mark.parametrize("name", BASELINES)


@every_recipe
def test_a_recipe_has_its_own_name_and_names_what_there_is(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert recipe.data.dataset in DATASETS
    dataset = DATASETS[recipe.data.dataset]
    assert {recipe.data.split, recipe.data.validation.split} <= set(dataset.splits)
    assert recipe.blueprint.teacher.num_classes == dataset.classes
    assert set(recipe.suites) <= set(SUITES)
    assert set(recipe.baselines) <= set(BASELINES)
    assert "pure" in recipe.baselines


@every_recipe
def test_a_recipe_can_be_validated_and_planned(name: str) -> None:
    recipe = find_recipe(name)
    assert Recipe.model_validate(recipe.model_dump()) == recipe  # what `model_copy` made is checked too
    names = [stage.name for stage in plan(recipe)]
    assert {f"pair-{pair.index}" for pair in recipe.blueprint.pairs} <= set(names)
    assert names[-2:] == ["report", "export"]


@every_recipe
def test_a_recipe_says_how_it_is_run(name: str) -> None:
    documentation = RECIPES[name].__doc__ or ""
    assert "Command:" in documentation
    assert f"m2mkd run {name}" in documentation


@pytest.mark.parametrize("of", RECIPES)
@every_baseline
def test_a_baseline_fits_every_recipe(of: str, name: str) -> None:
    control = find_recipe(f"{of}/{name}")
    assert control == baseline(find_recipe(of), name)
    assert Recipe.model_validate(control.model_dump()) == control
    assert (control.name, control.baselines) == (f"{of}/{name}", ())
    assert control.title != find_recipe(of).title
    assert plan(control)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmo", r"There is no recipe 'dmo'\. Known recipes: .*demo.*vmoe_base"),
        ("demo/pur", r"There is no baseline 'pur'\. Known baselines: authors_loss, incubation, pure, pure_matched"),
        ("demo/", r"There is no baseline ''"),
        ("/pure", r"There is no recipe ''"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_recipe(name)


# What the controls are


@pytest.fixture
def published() -> Recipe:
    return find_recipe("vmoe_base")


def test_pure_is_the_same_fine_tuning_from_random_weights(published: Recipe) -> None:
    pure = baseline(published, "pure")
    assert pure.start == "scratch"
    assert pure.finetune == published.finetune
    assert pure.blueprint == published.blueprint


def test_incubation_is_the_same_but_for_the_teachers_term(published: Recipe) -> None:
    control = baseline(published, "incubation")
    assert control.pairs.distill.alpha == 0
    same = {"name": "vmoe_base", "title": published.title, "baselines": published.baselines, "pairs": published.pairs}
    assert control.model_copy(update=same) == published
    assert control.pairs.train == published.pairs.train


def test_the_authors_loss_is_that_of_the_published_recipe_whatever_was_tuned(published: Recipe) -> None:
    tuned = ["pairs.distill={alpha: 0.9, temperature: 4, reduction: batchmean}"]
    control = baseline(
        override(published, [*tuned, "pairs.of={1: {lr: 0.01, alpha: 0.2}, 2: {temperature: 2}}"]), "authors_loss"
    )
    assert control.pairs.distill == published.pairs.distill
    assert {index: settings.given for index, settings in control.pairs.of.items()} == {1: {"lr": 0.01}}


def test_pure_matched_computes_as_much_as_pairs_and_fine_tuning(published: Recipe) -> None:
    """MAC of an epoch: all pairs' steps, and three forward passes of the student for a step end to end."""
    of_pairs = sum(pair_cost(published.blueprint, pair).total for pair in published.blueprint.pairs)
    of_student = 3 * student_macs(published.blueprint)
    total = 100 * of_pairs + 100 * of_student
    matched = baseline(published, "pure_matched")
    assert matched.finetune.epochs * of_student == pytest.approx(total)
    assert matched.finetune.epochs == pytest.approx(342, abs=2)  # "242 end-to-end epochs" and the 100
    start = {name: getattr(published.finetune, name) for name in ("epochs", "warmup_epochs", "lr")}
    assert matched.finetune.model_copy(update=start) == published.finetune


def test_pure_matched_has_what_training_from_random_weights_wants() -> None:
    recipe = override(find_recipe("demo"), ["finetune.epochs=4", "pairs.epochs=2"])
    matched = baseline(recipe, "pure_matched").finetune
    assert matched.warmup_epochs == pytest.approx(matched.epochs / 5)
    assert matched.lr == recipe.meta.lr
    assert matched.epochs == pytest.approx(4 * matched_factor(recipe))


def test_without_a_teacher_there_is_less_to_match() -> None:
    recipe = find_recipe("demo")
    assert 1 < matched_factor(baseline(recipe, "incubation")) < matched_factor(recipe)


# The published recipe: docs/method.md, "Common optimisation recipe" and the table of phases

PUBLISHED = {
    # phase: epochs, batch, learning rate, warm-up, drop path, clipping
    "meta": (300, 2048, 2e-3, 20, 0.0, None),
    "incubation": (100, 2048, 2e-3, 20, 0.1, None),
    "teacher": (100, 1024, 1e-3, 0, 0.1, 1.0),
    "pairs": (100, 2048, 2e-3, 20, 0.1, None),
    "finetune": (100, 1024, 1e-3, 0, 0.1, 1.0),
}


@pytest.fixture
def phases(published: Recipe) -> dict[str, Phase]:
    incubation = published.teacher.incubation
    assert incubation is not None
    return {
        "meta": published.meta,
        "incubation": incubation,
        "teacher": published.teacher.phase,
        "pairs": published.pairs,
        "finetune": published.finetune,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_vmoe_base_trains_every_phase_as_published(name: str, phases: dict[str, Phase]) -> None:
    phase = phases[name]
    found = (phase.epochs, phase.batch_size, phase.lr, phase.warmup_epochs, phase.drop_path, phase.clip_norm)
    assert found == PUBLISHED[name]
    assert phase.lr == pytest.approx(5e-4 * phase.batch_size / 512)
    common = (phase.betas, phase.eps, phase.weight_decay, phase.warmup_lr, phase.min_lr, phase.schedule)
    assert common == ((0.9, 0.999), 1e-8, 0.05, 1e-6, 1e-5, "epoch")
    assert phase.augmentation is None  # one augmentation for all phases


def test_vmoe_base_cuts_and_distills_as_published(published: Recipe) -> None:
    blueprint, distill = published.blueprint, published.pairs.distill
    assert (blueprint.teacher.name, blueprint.teacher_depths) == ("vit_large_patch16_224", (6, 6, 6, 6))
    assert (blueprint.student.vit.name, blueprint.student_depths) == ("vit_base_patch16_224", (3, 3, 3, 3))
    moe = blueprint.student.moe
    assert (moe.num_experts, moe.top_k, moe.blocks, moe.expert_init) == (8, 2, "all", "fastmoe")
    assert (distill.alpha, distill.temperature, distill.kind, distill.reduction) == (0.5, 1.0, "soft", "numel")
    assert (published.teacher.source, published.keep_stitches) == ("incubated", False)
    assert (blueprint.teacher.img_size, blueprint.teacher.num_classes) == (224, 1000)


def test_vmoe_base_augments_as_published(published: Recipe) -> None:
    assert published.data.augmentation == IMAGENET
    assert (IMAGENET.mixup, IMAGENET.cutmix, IMAGENET.mix_prob, IMAGENET.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (IMAGENET.label_smoothing, IMAGENET.random_erasing, IMAGENET.hflip) == (0.1, 0.25, 0.5)
    assert (IMAGENET.auto_augment, IMAGENET.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.4)
    assert (IMAGENET.scale, IMAGENET.ratio, IMAGENET.interpolation) == ((0.08, 1.0), (3 / 4, 4 / 3), "bicubic")


def test_a_lane_of_vmoe_base_is_a_gpus_batch(published: Recipe) -> None:
    assert [phase.batch_size // published.data.lanes for phase in (published.meta, published.finetune)] == [256, 128]
    assert published.placement.finetune.num_workers == published.data.lanes == 8


# The published recipe, small: an eighth of the widths, digits instead of ImageNet, a step or two of every phase

EIGHTH = (
    "blueprint.teacher.width=128",
    "blueprint.student.vit.width=96",
    *(f"{vit}.num_heads=4" for vit in ("blueprint.teacher", "blueprint.student.vit")),
    *(f"{vit}.img_size=32" for vit in ("blueprint.teacher", "blueprint.student.vit")),
    *(f"{vit}.patch_size=16" for vit in ("blueprint.teacher", "blueprint.student.vit")),
    *(f"{vit}.num_classes=10" for vit in ("blueprint.teacher", "blueprint.student.vit")),
    "data.dataset=digits",
    "data.validation.split=test",
    "suites=[digits]",
    "baselines=[]",
    *(f"{phase}.batch_size=16" for phase in ("meta", "teacher.incubation", "teacher.phase", "pairs", "finetune")),
    *(f"{phase}.epochs=0.5" for phase in ("meta", "teacher.incubation", "teacher.phase", "pairs", "finetune")),
    *(f"{phase}.warmup_epochs=0.25" for phase in ("meta", "teacher.incubation", "pairs")),
    "placement.finetune.engine=torch",
    *(f"placement.{part}.data_workers=0" for part in ("models", "pairs", "finetune", "evaluation")),
)


@pytest.fixture
def small_digits(tmp_path: Path) -> Callable[[], Path]:
    """64 training and 64 test images of digits, in eight row groups, one a lane."""

    def make() -> Path:
        write(
            open_digits(Path("sklearn"), DigitsOptions()),
            tmp_path / "data",
            WriteConfig(name="digits", limit=64, rows_per_group=8),
        )
        return tmp_path / "data"

    return make


@pytest.mark.slow
def test_vmoe_base_at_an_eighth_of_its_width_runs_through_all_its_stages(
    small_digits: Callable[[], Path], published: Recipe, tmp_path: Path
) -> None:
    recipe = override(published, [*EIGHTH, f"placement.data_root={small_digits()}"])
    store = Store(str(tmp_path / "runs"))
    outcome = execute(plan(recipe), store, LocalLauncher())
    outcome.raise_for_failures()
    own = variant(recipe)
    assert {"incubate-3", "teacher", "pair-3", "finetune", "evaluate-student"} <= set(own)
    for role, stage in own.items():
        assert store.status(stage.address).state == "complete", role
    for role in ("meta", "incubate-0", "teacher", "pair-0", "finetune"):
        history = json.loads((store.open(own[role].address) / "history.json").read_text())
        assert history[-1]["step"] == 2
    (student,) = json.loads((store.open(own["evaluate-student"].address) / "evaluation.json").read_text())
    assert student["results"][0]["num_images"] == 64
    assert len(student["results"][0]["experts"]) == 12
