"""Results are kept whole, and say who is ahead."""

from pathlib import Path

import pytest

from m2mkd_ray.errors import ArtifactError
from m2mkd_ray.execution import Store
from m2mkd_ray.sweeps.results import SweepResults, TrialRecord, read, write
from m2mkd_ray.sweeps.sweep import Sweep


def test_results_come_back_as_they_were_written(results: SweepResults, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write(store, results.model_copy(update={"state": "running", "trials": ()}))
    write(store, results)
    assert read(store, results.sweep) == results
    assert [file.name for file in (tmp_path / results.sweep.folder).iterdir()] == ["results.json"]


def test_a_sweep_that_was_not_started_has_none(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no results in .* Run it first"):
        read(Store(str(tmp_path)), sweep)


def test_a_file_that_is_damaged_is_said_so(results: SweepResults, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write(store, results)
    file = tmp_path / results.sweep.folder / "results.json"
    file.write_text(file.read_text()[:-100])
    with pytest.raises(ArtifactError, match=r"cannot be read: .* Move the file away"):
        read(store, results.sweep)


def trial(name: str, state: str, *values: float) -> TrialRecord:
    history = tuple((float(at + 1), value) for at, value in enumerate(values))
    return TrialRecord.model_validate({"name": name, "point": {}, "state": state, "history": history})


def test_the_best_trial_came_to_its_end(results: SweepResults) -> None:
    trials = (
        trial("a", "stopped", 0.9),
        trial("b", "complete", 0.8, 0.5),
        trial("c", "complete", 0.4, 0.6),
        trial("d", "failed", 0.99),
        trial("e", "waiting"),
    )
    changed = results.model_copy(update={"trials": trials})
    assert [one.name for one in changed.ranked] == ["c", "b", "a"]  # the last value counts, not the highest
    lowest = changed.model_copy(update={"sweep": results.sweep.model_copy(update={"mode": "min"})})
    assert [one.name for one in lowest.ranked] == ["b", "c", "a"]
    assert changed.model_copy(update={"trials": trials[3:]}).best is None


def test_a_value_at_an_epoch_is_the_last_one_until_then() -> None:
    one = trial("a", "complete", 0.1, 0.2, 0.3)
    assert [one.value_at(epoch) for epoch in (0.5, 1.0, 2.9, 9.0)] == [None, 0.1, 0.2, 0.3]


def test_trials_have_the_numbers_of_the_plan_in_whatever_order_they_began(results: SweepResults) -> None:
    begun = tuple(results.trials[place] for place in (3, 0, 5))
    changed = results.model_copy(update={"trials": begun})
    assert [changed.numbers[one.name] for one in begun] == [3, 0, 5]


def test_trials_without_a_plan_are_numbered_as_they_began(results: SweepResults) -> None:
    optuna = Sweep.model_validate(results.sweep.model_dump(mode="json") | {"searcher": "optuna"})
    changed = results.model_copy(update={"sweep": optuna})
    assert list(changed.numbers.values()) == list(range(12))
