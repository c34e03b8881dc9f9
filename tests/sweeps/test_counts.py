"""What trials in a cohort count while they train, against what was predicted, and alone."""

from pathlib import Path

import pytest

from m2mkd_ray.execution import LocalLauncher, Store, execute
from m2mkd_ray.sweeps.cost import Cost, alone, images_of
from m2mkd_ray.sweeps.expect import expect
from m2mkd_ray.sweeps.points import base
from m2mkd_ray.sweeps.sweep import Sweep


def counted(store: Store, addresses: list[str]) -> Cost:
    """Sums of the stages' counters."""
    metrics = [store.manifest(address)["metrics"] for address in addresses]
    names = ("flops", "teacher_calls", "decodes")
    return Cost(*(sum(one.get(name, 0.0) for one in metrics) for name in names))


def test_trials_of_a_cohort_count_what_was_predicted(tiny: Path, tmp_path: Path) -> None:
    """Four points of both pairs: each pair's teacher is run once, and every image is decoded once."""
    tree = {
        "name": "counts",
        "title": "Counts",
        "recipe": str(tiny),
        "settings": {"pairs.epochs": 1.4, "placement.pairs.log_every_steps": 2},
        "level": {"kind": "stage"},
        "space": {"pairs.distill.temperature": "grid([1, 2, 4, 8])"},
        "searcher": "grid",
        "budget": {"trials": 4},
    }
    sweep = Sweep.model_validate(tree)
    recipe, store = base(sweep), Store(str(tmp_path / "runs"))
    expected = expect(sweep, recipe, store)
    assert expected.cohorts == (8,)
    execute([*expected.shared, *expected.trained], store, LocalLauncher()).raise_for_failures()
    found = counted(store, [stage.address for stage in expected.trained])
    assert expected.together is not None
    assert found.flops == pytest.approx(expected.together.flops, rel=1e-9)
    assert (found.teacher_calls, found.decodes) == (expected.together.teacher_calls, expected.together.decodes)
    images = images_of(expected.trained[0], recipe)
    assert found.teacher_calls == 2 * images
    assert expected.alone is not None
    assert expected.alone.teacher_calls == 8 * images
    again = expect(sweep, recipe, store)
    assert (again.to_make, again.to_train) == ((), ())


def test_a_trial_alone_counts_its_training_steps(tiny: Path, tmp_path: Path) -> None:
    tree = {
        "name": "alone",
        "title": "Alone",
        "recipe": str(tiny),
        "level": {"kind": "pair", "index": 1},
        "space": {"pairs.distill.temperature": "grid([2])"},
        "searcher": "grid",
        "budget": {"trials": 1},
    }
    sweep = Sweep.model_validate(tree)
    recipe, store = base(sweep), Store(str(tmp_path / "runs"))
    expected = expect(sweep, recipe, store)
    (pair,) = expected.trained
    execute([*expected.shared, pair], store, LocalLauncher()).raise_for_failures()
    found = counted(store, [pair.address])
    predicted = alone(pair, images_of(pair, recipe), recipe)
    assert found.flops == pytest.approx(predicted.flops, rel=1e-9)
    assert found.teacher_calls == predicted.teacher_calls
