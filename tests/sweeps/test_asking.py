"""How many trials are asked for: as many as there is room for now, whatever was pickled, and by whom."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from ray import tune
from ray.tune.experiment import Experiment
from small_sweeps import small_sweep

from m2mkd_ray.sweeps import asking
from m2mkd_ray.sweeps.bell import close_desk, open_desk
from m2mkd_ray.sweeps.desk import Desk
from m2mkd_ray.sweeps.points import base, problems
from m2mkd_ray.sweeps.room import Room
from m2mkd_ray.sweeps.sweep import Sweep, TuneSearch
from m2mkd_ray.sweeps.trials import Trial

POINTS = [{"pairs.lr": value} for value in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)]


@dataclass
class Table:
    """What of a desk is looked at here."""

    room: Room


@pytest.fixture
def sweep(tiny: Path) -> Iterator[Sweep]:
    sweep = small_sweep(tiny)
    yield sweep
    close_desk(sweep)


def has_room_for(sweep: Sweep, trials: int) -> None:
    open_desk(sweep, cast(Desk, Table(Room(trials, trials))))


def asked(search: asking.InOrder) -> list[Any]:
    return [trial.config["point"] for trial in iter(search.next_trial, None)]


def in_order(sweep: Sweep, folder: Path) -> asking.InOrder:
    search = asking.InOrder(sweep)
    spec = {"point": tune.grid_search(POINTS)}
    search.add_configurations(Experiment("e", Trial, config=spec, storage_path=str(folder)))
    return search


def test_as_many_trials_are_asked_for_as_there_is_room(sweep: Sweep, tmp_path: Path) -> None:
    has_room_for(sweep, 2)
    search = in_order(sweep, tmp_path)
    assert asked(search) == POINTS[:2]
    assert asked(search) == []
    has_room_for(sweep, 4)  # nodes came
    assert asked(search) == POINTS[2:4]


def test_a_search_that_is_restored_goes_by_the_room_that_there_is_then(sweep: Sweep, tmp_path: Path) -> None:
    has_room_for(sweep, 2)
    search = in_order(sweep, tmp_path)
    asked(search)
    search.save_to_dir(str(tmp_path), "session")
    close_desk(sweep)
    restored = pickle.loads(pickle.dumps(asking.InOrder.__new__(asking.InOrder)))  # as Tune does, without a desk
    restored.__dict__.update(_sweep=sweep)
    restored.restore_from_dir(str(tmp_path))
    has_room_for(sweep, 5)
    assert asked(restored) == POINTS[2:]


def test_what_proposes_goes_by_the_room_too(sweep: Sweep) -> None:
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'm2mkd_ray[optuna]'")
    has_room_for(sweep, 1)
    search = asking.Proposed(sweep, asking.searcher_of(TuneSearch(name="optuna", arguments={"seed": 1})))
    search.set_search_properties("val_top1", "max", {"point": {"pairs.lr": tune.loguniform(1e-5, 1e-2)}})
    assert search.suggest("a")
    assert search.suggest("b") is None
    has_room_for(sweep, 2)
    assert search.suggest("b")


def test_tunes_searchers_are_taken_by_name_and_checked_before_anything_starts(tiny: Path) -> None:
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'm2mkd_ray[optuna]'")
    by_name = small_sweep(tiny, searcher={"kind": "tune", "name": "optuna", "arguments": {"seed": 3}})
    assert problems(by_name, base(by_name)) == []
    wrong = small_sweep(tiny, searcher={"kind": "tune", "name": "optuna", "arguments": {"sed": 3}})
    (problem,) = problems(wrong, base(wrong))
    assert problem == "searcher optuna: got an unexpected keyword argument 'sed'"


def test_a_searcher_whose_package_is_missing_says_how_to_get_it(tiny: Path) -> None:
    sweep = small_sweep(tiny, searcher={"kind": "tune", "name": "zoopt"})
    (problem,) = problems(sweep, base(sweep))
    assert "searcher zoopt: " in problem
    assert "pip install -U zoopt" in problem
