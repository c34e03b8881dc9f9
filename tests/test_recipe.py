from pathlib import Path

import pytest
import yaml

from m2mkd_ray.errors import UsageError
from m2mkd_ray.pipeline import plan
from m2mkd_ray.recipe import Phase, Recipe, Teacher, merged, override, read_yaml, to_yaml
from m2mkd_ray.recipes import RECIPES, find_recipe
from m2mkd_ray.training import TrainConfig


@pytest.fixture
def demo() -> Recipe:
    """The demo with an end-to-end teacher."""
    demo = find_recipe("demo")
    phase = Phase(epochs=16, lr=1e-3, batch_size=64)
    update = {"teacher": Teacher(source="trained", phase=phase), "meta": phase}
    return demo.model_copy(update=update)


def test_settings_that_dumps_leave_out_can_be_changed(demo: Recipe) -> None:
    changed = override(demo, ["finetune.decayed=all"])
    assert (changed.finetune.decayed, changed.meta.decayed) == ("all", "matrices")
    assert changed.finetune.train.decayed == "all"


def test_settings_are_changed_with_their_types_and_nothing_else(demo: Recipe) -> None:
    changed = override(
        demo,
        [
            "seed=3",
            "finetune.lr=1e-4",  # YAML 1.1 reads this as a string
            "pairs.distill.kind=hard",
            "blueprint.student_depths=[1, 2, 2, 3]",
            "data.max_rows=null",
            "keep_stitches=true",
            "suites=[fashion-small]",
            "meta.augmentation={kind: none, mean: [0, 0, 0], std: [1, 1, 1]}",
        ],
    )
    assert (changed.seed, changed.finetune.lr, changed.pairs.distill.kind) == (3, 1e-4, "hard")
    assert (changed.blueprint.student_depths, changed.data.max_rows) == ((1, 2, 2, 3), None)
    assert (changed.keep_stitches, changed.suites) == (True, ("fashion-small",))
    assert changed.meta.augmentation.mean == (0, 0, 0)
    back = {
        "seed": 0,
        "finetune": demo.finetune,
        "pairs": demo.pairs,
        "blueprint": demo.blueprint,
        "keep_stitches": False,
        "suites": demo.suites,
        "meta": demo.meta,
    }
    assert changed.model_copy(update=back) == demo


def test_the_recipe_that_is_changed_stays_as_it_is(demo: Recipe) -> None:
    before = demo.model_copy(deep=True)
    override(demo, ["data.augmentation.shift=7", "placement.pairs.resources.cpus=3"])
    assert demo == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetun.lr=1", r"no setting 'finetun\.lr': 'finetun' is unknown; did you mean finetune\?"),
        ("finetune.learning_rate=1", r"'learning_rate' is unknown; known here: epochs, lr"),
        ("pairs.distill.alfa=1", r"'alfa' is unknown; did you mean alpha\?"),
        ("pairs.augmentation.shift=1", r"lies below 'augmentation', which is not set .*; give all of 'augmentation'"),
        ("teacher.incubation.lr=1", r"lies below 'incubation', which is not set in this recipe"),
        ("seed.x=1", r"'seed\.x' lies below 'seed', which is a plain value \(0\)"),
        ("seed", r"'seed' is not of the form a\.b=value"),
        ("suites=[a", r"the value of 'suites=\[a' is not YAML"),
        ("seed=2026-02-30", r"the value of 'seed=2026-02-30' is not YAML: day"),
        ("seed=many", r"seed: .*integer.* \(found 'many'\)"),
        ("seed=-1", r"seed: .*greater than or equal to 0"),
        ("pairs.distill.alpha=2", r"pairs\.distill\.alpha: .*less than or equal to 1 \(found 2\)"),
        (
            "finetune.precision=fp16",
            r"finetune\.precision: Input should be 'fp32', 'bf16' or 'bf16_pure' \(found 'fp16'\)",
        ),
        ("meta.augmentation={kind: light, color: 1}", r"meta\.augmentation\.color: Extra inputs"),
        ("blueprint.teacher_depths=[3,3,3]", r"blueprint: teacher_depths \(3, 3, 3\) add up to 9 blocks, but teacher"),
        ("meta.warmup_epochs=99", r"meta: warmup_epochs 99\.0 is more than epochs 16\.0"),
        ("teacher.source=incubated", r"teacher: `incubation` is needed by source=incubated, and only by it"),
        ("teacher.source=pretrained", r"teacher: `weights` is needed by source=pretrained, and only by it"),
        ("teacher.tune=head", r"tune=head is for source=pretrained; this teacher is trained"),
        ("pairs.batch_size=63", r"recipe: pairs\.batch_size 63 is not a multiple of data\.lanes 2"),
        ("data={}", r"data\.dataset: Field required"),
        ("placement.finetune.num_workers=3", r"placement\.finetune\.num_workers 3 does not divide data\.lanes 2"),
        ("placement.finetune.deepspeed.zero_stage=3", r"zero_stage: Input should be 0, 1 or 2 \(found 3\)"),
        ("suites=[]", r"suites is empty: name at least one"),
    ],
)
def test_what_is_wrong_with_a_setting_is_said_with_names_and_values(demo: Recipe, setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        override(demo, [setting])


def test_an_odd_number_of_images_cannot_be_mixed(demo: Recipe) -> None:
    with pytest.raises(UsageError, match=r"meta\.batch_size 66 in data\.lanes 2 gives 33 images each, an odd number"):
        override(demo, ["data.augmentation.mixup=0.8", "meta.batch_size=66"])
    assert override(demo, ["data.augmentation.mixup=0.8", "meta.batch_size=68"]).meta.batch_size == 68


def test_one_process_needs_no_lane_for_each_rank(demo: Recipe) -> None:
    assert override(demo, ["placement.finetune.engine=torch", "placement.finetune.num_workers=3"])


def test_all_misspelt_settings_are_told_at_once(demo: Recipe) -> None:
    with pytest.raises(UsageError) as error:
        override(demo, ["sed=1", "finetune.lr", "pairs.lr=1e-3", "data.rows=5"])
    assert str(error.value).splitlines()[0] == "Cannot change recipe 'demo':"
    assert len(str(error.value).splitlines()) == 4


def test_all_values_that_do_not_fit_are_told_at_once(demo: Recipe) -> None:
    with pytest.raises(UsageError) as error:
        override(demo, ["pairs.batch_size=63", "meta.batch_size=61", "placement.finetune.num_workers=3"])
    assert all(text in str(error.value) for text in ("pairs.batch_size 63", "meta.batch_size 61", "num_workers 3"))


def test_a_file_changes_what_it_names(demo: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "from: demo\n"
        "name: mine\n"
        "pairs:\n  epochs: 2\n  distill: {alpha: 0.9}\n"
        "finetune.lr: 1e-3\n"
        "pairs.distill: {temperature: 2}\n"
        "teacher:\n  source: incubated\n  incubation: {epochs: 1, lr: 0.001, batch_size: 64}\n"
    )
    base, changes = read_yaml(file)
    recipe = merged(demo, changes, str(file))
    assert (base, recipe.name, recipe.pairs.epochs, recipe.finetune.lr) == ("demo", "mine", 2, 1e-3)
    assert recipe.pairs.distill == demo.pairs.distill.model_copy(update={"alpha": 0.9, "temperature": 2.0})
    assert recipe.pairs.batch_size == demo.pairs.batch_size
    assert recipe.teacher.incubation == Phase(epochs=1, lr=0.001, batch_size=64)
    assert recipe.data == demo.data


def test_all_misspelt_settings_of_a_file_are_told_with_its_name(demo: Recipe) -> None:
    with pytest.raises(UsageError) as error:
        merged(demo, {"finetun": {"lr": 1}, "pairs": {"alpha": 0.5}}, "mine.yaml")
    told = str(error.value).splitlines()
    assert told[0] == "Cannot change recipe 'mine.yaml':"
    assert "'finetun' is unknown; did you mean finetune?" in told[1]
    assert "there is no setting 'pairs.alpha'" in told[2]


@pytest.mark.parametrize(
    ("content", "message"), [("name: mine\n", "must start with `from: NAME`"), ("- from\n", "expected `from: NAME`")]
)
def test_a_file_that_is_no_recipe_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_yaml(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_yaml(name: str, tmp_path: Path) -> None:
    recipe = find_recipe(name)
    assert Recipe.model_validate(yaml.safe_load(to_yaml(recipe))) == recipe
    file = tmp_path / "copy.yaml"
    file.write_text("from: demo\n" + to_yaml(recipe))
    base, changes = read_yaml(file)
    assert merged(find_recipe(base), changes, str(file)) == recipe


def test_a_phase_gives_the_training_loop_its_part(demo: Recipe) -> None:
    settings = {name: getattr(demo.pairs, name) for name in TrainConfig.model_fields}
    assert demo.pairs.train == TrainConfig(**settings)


def test_recipes_cannot_be_changed_in_place(demo: Recipe) -> None:
    with pytest.raises(ValueError, match="frozen"):
        demo.seed = 1


def test_a_changed_recipe_can_be_planned(demo: Recipe) -> None:
    assert len(plan(override(demo, ["baselines=[]"]))) < len(plan(demo))


def test_single_pairs_are_changed_by_their_index(demo: Recipe) -> None:
    changed = override(demo, ["pairs.of.2.temperature=4", "pairs.of.0.lr=0.002"])
    assert changed.pairs.at(2).distill == demo.pairs.distill.model_copy(update={"temperature": 4.0})
    assert changed.pairs.at(0).lr == 0.002
    assert changed.pairs.at(1) == demo.pairs
    again = override(changed, ["pairs.of.2.temperature=null", "pairs.of.0.lr=null"])
    assert again == demo  # what says nothing is nothing
    assert "of" not in demo.model_dump()["pairs"]


def test_single_pairs_of_a_file_come_back(demo: Recipe, tmp_path: Path) -> None:
    changed = merged(demo, {"pairs": {"of": {1: {"alpha": 0.9}, "2": {"kind": "hard"}}}}, "mine.yaml")
    assert changed.pairs.at(1).distill.alpha == 0.9
    assert changed.pairs.at(2).distill.kind == "hard"
    (tmp_path / "again.yaml").write_text(f"from: demo\n{to_yaml(changed)}")
    _, changes = read_yaml(tmp_path / "again.yaml")
    assert merged(demo, changes, "again.yaml") == changed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pairs.of.7.temperature=4", "'7' is unknown; known here: 0, 1, 2, 3"),
        ("pairs.of.2.temprature=4", "did you mean temperature"),
        ("pairs.of.2.alpha=3", r"of.2.alpha: Input should be less than or equal to 1 \(found 3.0\)"),
        ("pairs.of={9: {alpha: 0.1}}", r"pairs.of names pairs \[9\], but there are pairs 0 to 3"),
    ],
)
def test_what_is_wrong_with_a_single_pair_is_said(demo: Recipe, setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        override(demo, [setting])
