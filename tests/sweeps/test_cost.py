"""Costs against a step's own count, and by hand for a cohort."""

import pytest

from m2mkd_ray.models.compute import step_cost, step_flops, vit_block_macs
from m2mkd_ray.pipeline import variant
from m2mkd_ray.recipe import override
from m2mkd_ray.recipes import find_recipe
from m2mkd_ray.sweeps.cost import alone, images_of, is_pair, seated, together

DEMO = find_recipe("demo")
ROWS = 8000


def pair(index: int, *settings: str):
    return variant(override(DEMO, settings) if settings else DEMO)[f"pair-{index}"]


@pytest.mark.parametrize("index", range(4))
def test_alone_every_image_costs_a_training_step(index: int) -> None:
    of_step = step_flops(DEMO.blueprint, DEMO.blueprint.pairs[index])
    cost = alone(pair(index), 1000, DEMO)
    assert cost.flops == pytest.approx(1000 * of_step)
    assert (cost.teacher_calls, cost.decodes) == (1000, 1000)


def test_eight_trials_of_a_pair_share_prefix_and_teacher() -> None:
    trials = [pair(2, f"pairs.distill.temperature={t}") for t in range(1, 9)]
    cost = step_cost(DEMO.blueprint, DEMO.blueprint.pairs[2])
    by_hand = 2 * (8 * (cost.student + cost.after) + cost.before + cost.teacher)
    shared = together([(trial, 500.0) for trial in trials], DEMO)
    assert shared.flops == pytest.approx(500 * by_hand)
    assert (shared.teacher_calls, shared.decodes) == (500, 500)


def test_a_member_that_leaves_early_takes_nothing_that_others_need() -> None:
    short, long = pair(3, "pairs.distill.alpha=0.3"), pair(1)
    block = 2 * vit_block_macs(DEMO.blueprint.teacher)
    of = {index: step_cost(DEMO.blueprint, DEMO.blueprint.pairs[index]) for index in (1, 3)}
    shared = together([(short, 100.0), (long, 300.0)], DEMO)
    prefix = 300 * block + 2 * 100 * block  # the first module as long as anyone is there, two more for the deep one
    own = sum(2 * n * (of[i].student + of[i].after + of[i].teacher) for i, n in ((3, 100), (1, 300)))
    assert shared.flops == pytest.approx(prefix + own)
    assert shared.teacher_calls == 400


def test_without_a_teacher_no_image_goes_through_one() -> None:
    assert alone(pair(0, "pairs.distill.alpha=0"), 100, DEMO).teacher_calls == 0


def test_small_data_are_decoded_once_and_large_ones_for_every_batch() -> None:
    assert alone(pair(0), 5.0 * ROWS, DEMO).decodes == ROWS
    timm = override(DEMO, ["data.augmentation.kind=timm", "data.augmentation.shift=0"])
    assert alone(variant(timm)["pair-0"], 5.0 * ROWS, timm).decodes == 5 * ROWS


def test_images_are_those_of_whole_steps() -> None:
    assert images_of(pair(0), DEMO) == 6 * (ROWS // 64) * 64
    assert images_of(pair(0), DEMO, epochs=2) == 2 * (ROWS // 64) * 64
    assert images_of(pair(0), DEMO, epochs=99) == images_of(pair(0), DEMO)


def test_seats_go_to_mates_and_to_trials_of_a_pair_together() -> None:
    trials = [pair(i, f"pairs.distill.temperature={t}") for t in (1, 2, 3) for i in (0, 1)]
    others = [pair(0, "pairs.batch_size=32")]
    cohorts = seated([*trials, *others, trials[0]], 4)
    assert [[stage.name for stage in cohort] for cohort in cohorts] == [
        ["pair-0", "pair-0", "pair-0", "pair-1"], ["pair-1", "pair-1"], ["pair-0"],
    ]  # fmt: skip


def test_a_pair_is_a_students_module() -> None:
    stages = variant(DEMO)
    assert is_pair(stages["pair-0"])
    assert not any(is_pair(stages[role]) for role in ("incubate-0", "meta", "finetune"))
