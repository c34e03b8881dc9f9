"""The plan of a sweep, against a store that has nothing and one that has some of it."""

from pathlib import Path

import pytest

from m2mkd_ray.execution import LocalLauncher, Store, execute
from m2mkd_ray.execution.stage import in_order
from m2mkd_ray.sweeps import find_sweep
from m2mkd_ray.sweeps.cost import Cost
from m2mkd_ray.sweeps.expect import expect
from m2mkd_ray.sweeps.points import base
from m2mkd_ray.sweeps.sweep import Sweep


def test_a_plan_counts_each_training_once(tmp_path: Path) -> None:
    sweep = find_sweep("temperature")
    expected = expect(sweep, base(sweep), Store(str(tmp_path)))
    assert (expected.num_trials, expected.epochs) == (5, 6)
    assert len(expected.trained) == 5 * 4 * 2  # points, pairs, seeds
    # of a seed: meta, four modules of the teacher, put together, tuned, cut; and the data, once
    assert len(expected.shared) == 2 * 8 + 1
    assert expected.to_make == expected.shared
    assert expected.cohorts == (20, 20)  # all of a seed, for which there are seats


def test_sharing_costs_less_and_the_counts_are_those_of_the_images(tmp_path: Path) -> None:
    sweep = find_sweep("quick")
    expected = expect(sweep, base(sweep), Store(str(tmp_path)))
    images = 4 * 2560  # epochs, rows
    assert expected.cohorts == (4, 2)
    assert expected.alone is not None
    assert expected.alone.teacher_calls == 6 * images
    assert expected.together == Cost(expected.together.flops, 2 * images, 2 * 2560)
    assert 0.4 < expected.share < 0.7


def test_what_the_store_has_is_not_made_again(tmp_path: Path) -> None:
    sweep = find_sweep("quick")
    recipe, store = base(sweep), Store(str(tmp_path))
    (data,) = (stage for stage in expect(sweep, recipe, store).shared if stage.name == "data")
    execute(in_order([data]), store, LocalLauncher()).raise_for_failures()
    expected = expect(sweep, recipe, store)
    assert len(expected.shared) - len(expected.to_make) == 1


def test_where_points_are_not_known_no_cost_is_claimed(tmp_path: Path) -> None:
    sweep = Sweep.model_validate(find_sweep("quick").model_dump(mode="json") | {"searcher": "optuna"})
    expected = expect(sweep, base(sweep), Store(str(tmp_path)))
    assert (expected.points, expected.together, expected.share, expected.num_trials) == (None, None, None, 6)
    assert expected.shared


@pytest.mark.parametrize("level", [{"kind": "full"}])
def test_at_the_full_level_the_fine_tuning_is_a_trials_own(level: dict, tmp_path: Path) -> None:
    tree = find_sweep("temperature").model_dump(mode="json") | {"level": level}
    sweep = Sweep.model_validate(tree)
    expected = expect(sweep, base(sweep), Store(str(tmp_path)))
    names = [stage.name for stage in expected.trained]
    assert names.count("finetune") == 10
    assert "finetune" not in {stage.name for stage in expected.shared}
