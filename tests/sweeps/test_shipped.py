"""Contracts over the table of sweeps."""

import pytest
import yaml

from m2mkd_ray.errors import UsageError
from m2mkd_ray.sweeps import SWEEPS, find_sweep
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.points import base, check, corners, recipes, targets
from m2mkd_ray.sweeps.sweep import to_yaml, validated

every_sweep = pytest.mark.parametrize("name", SWEEPS)


@every_sweep
def test_a_sweep_has_its_own_name_and_nothing_is_wrong_with_it(name: str) -> None:
    sweep = SWEEPS[name]()
    assert sweep.name == name
    assert check(sweep) == base(sweep)


@every_sweep
def test_a_sweep_comes_back_from_yaml(name: str) -> None:
    sweep = SWEEPS[name]()
    again = validated(yaml.safe_load(to_yaml(sweep)), name)
    assert again == sweep
    assert again.key == sweep.key


@every_sweep
def test_every_corner_of_a_sweep_can_be_planned(name: str) -> None:
    sweep = SWEEPS[name]()
    for point in corners(sweep.space):
        for recipe in recipes(sweep, point).values():
            assert targets(sweep, recipe)


@every_sweep
def test_a_sweep_says_how_it_is_run_and_its_points_are_known(name: str) -> None:
    assert f"m2mkd sweep {name}" in (SWEEPS[name].__doc__ or "")
    assert len(drawn(SWEEPS[name]()) or ()) == SWEEPS[name]().budget.trials


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"There is no sweep 'quik'\. Known sweeps: distillation, .*quick"):
        find_sweep("quik")
