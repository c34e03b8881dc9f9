"""Points that are known beforehand."""

import itertools
import math

from m2mkd_ray.sweeps import find_sweep
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.sweep import Sweep

ALPHA, REDUCTION, TEMPERATURE = "pairs.distill.alpha", "pairs.distill.reduction", "pairs.distill.temperature"


def changed(name: str, **changes: object) -> Sweep:
    return Sweep.model_validate(find_sweep(name).model_dump(mode="json") | changes)


def test_a_grid_has_every_point_once() -> None:
    space = {ALPHA: "grid([0.1, 0.5])", REDUCTION: "choice([numel, batchmean])", TEMPERATURE: "grid([1, 2, 4])"}
    sweep = changed("loss-weights", space=space, searcher="grid", budget={"trials": 12})
    wanted = itertools.product([0.1, 0.5], ["numel", "batchmean"], [1, 2, 4])
    assert drawn(sweep) == [dict(zip(space, values, strict=True)) for values in wanted]


def test_points_that_differ_only_in_what_has_no_effect_are_one() -> None:
    space = {
        REDUCTION: "choice([numel, batchmean])",
        TEMPERATURE: {"domain": "grid([1, 2, 4])", "when": {REDUCTION: "batchmean"}},
    }
    sweep = changed("loss-weights", space=space, searcher="grid", budget={"trials": 6})
    points = drawn(sweep) or []
    assert len(points) == 4
    assert points[0] == {REDUCTION: "numel"}


def test_random_points_are_the_same_ones_each_time_and_others_for_another_seed() -> None:
    sweep = find_sweep("distillation")
    assert drawn(sweep) == drawn(sweep)
    other = changed("distillation", searcher={"kind": "random", "seed": 1})
    assert drawn(other) != drawn(sweep)


def test_more_trials_begin_with_those_of_fewer() -> None:
    fewer, more = (drawn(changed("distillation", budget={"trials": n})) or [] for n in (5, 9))
    assert more[:5] == fewer


def test_random_points_lie_in_their_domains_and_follow_their_distribution() -> None:
    sweep = changed("quick", budget={"trials": 400})
    temperatures = [point[TEMPERATURE] for point in drawn(sweep) or ()]
    assert all(1 <= value <= 8 for value in temperatures)
    below = sum(value < math.sqrt(8) for value in temperatures) / len(temperatures)
    assert 0.42 < below < 0.58  # the middle of a logarithmic range; uniform ones would have 0.26 below


def test_a_grid_in_random_search_is_gone_through_for_every_draw() -> None:
    space = {ALPHA: "uniform(0, 1)", TEMPERATURE: "grid([1, 2, 4])"}
    points = drawn(changed("loss-weights", space=space, budget={"trials": 3})) or []
    assert [point[TEMPERATURE] for point in points] == [1, 2, 4] * 3
    assert points[0][ALPHA] == points[2][ALPHA] != points[3][ALPHA]


def test_a_searcher_that_looks_at_values_has_no_points_beforehand() -> None:
    assert drawn(changed("quick", searcher="optuna")) is None
