"""From points to recipes, the stages that are measured, and every mistake that is found before anything starts."""

from typing import Any

import pytest

from m2mkd_ray.errors import PlanError, UsageError
from m2mkd_ray.execution.stage import in_order
from m2mkd_ray.pipeline import variant
from m2mkd_ray.recipe import override
from m2mkd_ray.recipes import find_recipe
from m2mkd_ray.sweeps import find_sweep
from m2mkd_ray.sweeps.points import (
    base,
    check,
    corners,
    epochs_of,
    metric_of,
    problems,
    recipes,
    recorded,
    targets,
    value_of,
)
from m2mkd_ray.sweeps.space import Parameter
from m2mkd_ray.sweeps.sweep import Sweep

TEMPERATURE, ALPHA = "pairs.distill.temperature", "pairs.distill.alpha"


def of_demo(**changes: Any) -> Sweep:
    tree = {
        "name": "mine",
        "title": "Mine",
        "recipe": "demo",
        "level": {"kind": "stage"},
        "space": {TEMPERATURE: "loguniform(1, 8)"},
        "budget": {"trials": 4},
    }
    return Sweep.model_validate({**tree, **changes})


def found(**changes: Any) -> list[str]:
    sweep = of_demo(**changes)
    return problems(sweep, base(sweep))


def test_a_point_is_the_recipe_with_its_values_for_every_seed() -> None:
    sweep = of_demo(seeds=[3, 5], settings={"pairs.epochs": 2, "pairs.warmup_epochs": 0})
    by_seed = recipes(sweep, {TEMPERATURE: 2.5})
    wanted = override(find_recipe("demo"), ["pairs.epochs=2", "pairs.warmup_epochs=0", f"{TEMPERATURE}=2.5"])
    for seed in (3, 5):
        of_pairs = [variant(recipe)["pair-1"] for recipe in (by_seed[seed], override(wanted, [f"seed={seed}"]))]
        assert of_pairs[0].address == of_pairs[1].address
    assert by_seed[3].placement.pairs.cohort == sweep.cohort


def test_points_of_a_seed_share_all_but_what_they_change() -> None:
    sweep = of_demo()
    stages = [
        {s.name: s.address for s in in_order(targets(sweep, recipes(sweep, {TEMPERATURE: value})[0]))}
        for value in (2.0, 3.0)
    ]
    different = {name for name in stages[0] if stages[0][name] != stages[1][name]}
    assert different == {f"pair-{i}" for i in range(4)}
    assert {"data", "meta", "teacher", "split", "incubate-0"} <= set(stages[0])


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"level": {"kind": "pair", "index": 2}}, ["pair-2"]),
        ({"level": {"kind": "stage", "over": "worst"}}, ["pair-0", "pair-1", "pair-2", "pair-3"]),
        ({"level": {"kind": "full"}}, ["finetune"]),
        ({"level": {"kind": "full"}, "metric": "fashion-small/top1"}, ["evaluate-student"]),
    ],
)
def test_a_level_says_what_is_measured(changes: dict[str, Any], names: list[str]) -> None:
    sweep = of_demo(**changes)
    recipe = recipes(sweep, {TEMPERATURE: 2.0})[0]
    assert [stage.name for stage in targets(sweep, recipe)] == names
    assert problems(sweep, base(sweep)) == []
    pairs = [stage.name for stage in recorded(sweep, recipe) if stage.name.startswith("pair")]
    assert pairs == (["pair-2"] if names == ["pair-2"] else [f"pair-{i}" for i in range(4)])


def test_the_accuracy_of_a_suite_goes_by_the_evaluations_name() -> None:
    assert metric_of(of_demo(level={"kind": "full"}, metric="fashion-small/top1")) == "student/fashion-small/top1"
    assert metric_of(of_demo()) == "val_top1"


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"level": {"kind": "stage", "over": "mean"}}, 0.5),
        ({"level": {"kind": "stage", "over": "worst"}}, 0.2),
        ({"level": {"kind": "stage", "over": "worst"}, "metric": "loss", "mode": "min"}, 0.8),
    ],
)
def test_hybrids_count_by_their_mean_or_the_worst(changes: dict[str, Any], value: float) -> None:
    assert value_of(of_demo(**changes), [0.2, 0.5, 0.8]) == pytest.approx(value)


def test_a_pair_may_have_a_temperature_of_its_own() -> None:
    sweep = of_demo(space={"pairs.of.3.temperature": "loguniform(1, 8)"})
    assert problems(sweep, base(sweep)) == []
    stages = [variant(recipes(sweep, {"pairs.of.3.temperature": value})[0]) for value in (1.0, 4.0)]
    different = {role for role in stages[0] if stages[0][role].address != stages[1][role].address}
    assert {"pair-3", "finetune"} <= different
    assert not {"pair-0", "pair-1", "pair-2", "meta", "teacher"} & different
    # the same stage as if all pairs had that temperature
    of_all = variant(override(find_recipe("demo"), [f"{TEMPERATURE}=4.0"]))
    assert stages[1]["pair-3"].address == of_all["pair-3"].address


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"incubate.temperature": "loguniform(1, 8)"}}, f"'incubate' is .*Did you mean {TEMPERATURE}"),
        ({"space": {"pairs.distill.temprature": "uniform(1, 8)"}}, "did you mean temperature"),
        ({"space": {"pairs.of.7.alpha": "uniform(0, 1)"}}, "'7' is unknown; known here: 0, 1, 2, 3"),
        ({"space": {ALPHA: "uniform(0, 2)"}}, r"less than or equal to 1 \(found 2\) \(2 of uniform\(0, 2\)\)"),
        ({"space": {"pairs.of.1.alpha": "uniform(0, 2)"}}, r"of.1.alpha: .*less than or equal to 1"),
        ({"space": {"pairs.distill.reduction": "choice([mean, numel])"}}, r"found 'mean'.*\('mean' of choice"),
        ({"space": {TEMPERATURE: "choice([warm])"}}, "should be a valid number"),
        ({"space": {"pairs.batch_size": "uniform(32, 64)"}}, "should be a valid integer"),
        ({"space": {"finetune.lr": "loguniform(1e-4, 1e-3)"}}, "changes nothing that is measured at level stage"),
        ({"space": {"placement.pairs.micro_batch": "choice([32, 64])"}}, "changes nothing that is measured"),
        (
            {"space": {"pairs.warmup_epochs": "uniform(0, 4)", "pairs.epochs": "uniform(2, 8)"}},
            "pairs.warmup_epochs=4, pairs.epochs=2: .*warmup_epochs 4.0 is more than epochs 2.0",
        ),
        (
            {"space": {"pairs.batch_size": "choice([64, 20000])"}},
            r"space.pairs.batch_size, choice\(.*20000 is more than the 8000 rows",
        ),
        ({"space": {"data.dataset": "choice(['fashion-mnist-small', fashion])"}}, "Known data sets"),
        ({"space": {"blueprint.student.moe.top_k": "choice([1, 9])"}}, "top_k 9 is more than num_experts 8"),
        ({"metric": "val_top"}, "no trial of level stage reports it. .* did you mean val_top1"),
        ({"metric": "fashion-small/top1"}, "no trial of level stage reports it"),
        ({"metric": "loss"}, "mode max looks for the worst loss: set mode to min"),
        ({"level": {"kind": "pair", "index": 4}}, "there is no such pair, only 0 to 3"),
        ({"recipe": "demo/pure"}, "has no pairs"),
        ({"scheduler": {"kind": "asha", "grace": 6}}, "grace 6 leaves nothing to stop: a trial has 6 epochs"),
        ({"scheduler": {"kind": "asha", "grace": 2, "max": 9}}, "scheduler.max 9 is more than pairs.epochs 6"),
        ({"scheduler": {"kind": "median", "grace": 1}}, "over before pairs is validated: .*now 2.0, to 1 or less"),
        (
            {"level": {"kind": "full"}, "metric": "fashion-small/top1", "scheduler": {"kind": "asha", "grace": 1}},
            "fashion-small/top1 is known at the end only",
        ),
        ({"searcher": "grid", "space": {TEMPERATURE: "choice([1, 2, 3, 4, 5])"}}, "grid has 5 points, but .* is 4"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_starts(changes: dict[str, Any], message: str) -> None:
    (problem,) = found(**changes)
    with pytest.raises(AssertionError, match=message):  # `match` searches, and shows both when it fails
        raise AssertionError(problem)


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2mkd_ray.sweeps.points.find_spec", lambda name: None)
    (problem,) = found(searcher="optuna")
    assert "pip install 'm2mkd_ray[optuna]'" in problem


def test_all_problems_are_in_one_message() -> None:
    sweep = of_demo(space={ALPHA: "uniform(0, 2)", "pairs.lrr": "uniform(0, 1)"}, metric="top1")
    with pytest.raises(PlanError, match="3 problems") as refused:
        check(sweep)
    assert all(text in str(refused.value) for text in ("space.pairs.distill.alpha", "pairs.lrr", "'top1'"))


def test_an_unknown_setting_of_all_trials_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="did you mean epochs"):
        check(of_demo(settings={"pairs.epoch": 3}))


def test_what_a_condition_asks_for_is_there_when_a_parameter_is_tried() -> None:
    cache = {"domain": "choice([{kind: float16}, null])", "when": {"pairs.views": [2]}}
    assert found(space={"pairs.cache": cache, "pairs.views": "choice([2, null])"}) == []
    (problem,) = found(space={"pairs.cache": cache["domain"]})
    assert "keeps the logits of views that come again" in problem


def test_of_very_many_corners_some_are_tried() -> None:
    space = {f"p{i}": Parameter(domain="uniform(0, 1)") for i in range(10)}
    assert len(corners(space)) == 64
    assert corners(space) == corners(space)
    few = {"a": Parameter(domain="uniform(0, 1)"), "b": Parameter(domain="choice([1, 2, 3])")}
    assert len(corners(few)) == 6


def test_a_trial_has_the_epochs_of_its_training_or_its_schedulers() -> None:
    sweep = of_demo(scheduler={"kind": "asha", "grace": 2, "max": 4})
    assert epochs_of(sweep, base(sweep)) == 4
    assert epochs_of(of_demo(), base(of_demo())) == 6
    assert epochs_of(of_demo(level={"kind": "full"}), base(of_demo())) == 3


@pytest.mark.parametrize("level", ["stage", "full"])
def test_trials_of_other_lengths_are_not_compared_by_epoch(level: str) -> None:
    phase = "finetune" if level == "full" else "pairs"
    space = {f"{phase}.epochs": "choice([4, 12])"}
    asha = {"kind": "asha", "grace": 2, "reduction": 2}
    (problem,) = found(level={"kind": level}, space=space, scheduler=asha)
    assert f"space.{phase}.epochs: scheduler asha compares trials at the same epoch" in problem
    assert found(level={"kind": level}, space=space) == []


def test_quick_is_checked_in_seconds() -> None:
    import time

    began = time.perf_counter()
    check(find_sweep("quick"))
    assert time.perf_counter() - began < 5
