"""A sweep on a local Ray: trials share a cohort, ASHA stops some, and what ends equals what would have been alone."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.util import placement_group_table
from small_sweeps import bits, lent, small_sweep, stage_of, stopped_by_hand

from m2mkd_ray.errors import ArtifactError, PlanError
from m2mkd_ray.execution import Event, LocalLauncher, StageStarted, Store, execute
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.sweeps import results as on_disk
from m2mkd_ray.sweeps import tuning
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.results import SweepResults
from m2mkd_ray.sweeps.sweep import Sweep
from m2mkd_ray.sweeps.trials import board_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Tune's loggers leave the files of trials open that it stops all at once (ray 2.60, tune/logger).
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
]
TRIALS = 6


@dataclass
class Ran:
    """A sweep that was run."""

    sweep: Sweep
    store: Store
    launcher: RayLauncher
    results: SweepResults
    events: list[Event]


@pytest.fixture(scope="module")
def ran(tiny: Path, launcher: RayLauncher, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Six trials in one cohort on a local Ray of two cores."""
    store = Store(str(tmp_path_factory.mktemp("sweep")))
    sweep, events = small_sweep(tiny, budget={"trials": TRIALS}, cohort=TRIALS), list[Event]()
    return Ran(sweep, store, launcher, tuning.run(sweep, store, launcher, on_event=events.append), events)


def test_asha_stops_trials_and_the_others_come_to_their_end(ran: Ran) -> None:
    trials = ran.results.trials
    assert [dict(trial.point) for trial in trials] == drawn(ran.sweep)
    assert {trial.state for trial in trials} == {"complete", "stopped"}
    assert all([epoch for epoch, _ in trial.history] == [1, 2, 3, 4] for trial in trials if trial.state == "complete")
    assert all(trial.epochs in (1, 2) and "asha" in trial.why for trial in trials if trial.state == "stopped")
    assert ran.results.best is not None
    assert ran.results.best.value == max(trial.value or 0.0 for trial in trials if trial.state == "complete")


def test_decisions_are_those_of_the_rule_in_the_order_of_the_trials(ran: Ran) -> None:
    found = {number: t.epochs for number, t in enumerate(ran.results.trials) if t.state == "stopped"}
    assert found == stopped_by_hand([dict(trial.history) for trial in ran.results.trials], epochs=4)


def test_all_were_members_of_one_cohort(ran: Ran) -> None:
    started = [e for e in ran.events if isinstance(e, StageStarted) and e.stage.name == "pair-1"]
    assert len(started) == TRIALS
    assert {len(event.where["cohort"]) for event in started} == {TRIALS}


def test_trials_that_ended_equal_their_stages_run_alone_bit_for_bit(ran: Ran, tmp_path: Path) -> None:
    ended = [trial for trial in ran.results.trials if trial.state == "complete"]
    stages = [stage_of(ran.sweep, trial) for trial in ended]
    alone = lent(ran.store, {need.address for stage in stages for need in stage.reads.values()}, tmp_path / "alone")
    execute(stages[:2], alone, LocalLauncher()).raise_for_failures()
    for trial, stage in list(zip(ended, stages, strict=True))[:2]:
        assert bits(alone, stage.address) == bits(ran.store, stage.address)
        assert alone.manifest(stage.address)["metrics"]["val_top1"] == trial.value


def test_teacher_and_decoder_worked_once_for_all(ran: Ran) -> None:
    """Four epochs of 320 images went through the teacher, and each image was decoded once, whoever was there."""
    stages = [stage for trial in ran.results.trials for stage in trial.stages]
    calls = sum(stage.counters["teacher_calls"] for stage in stages)
    assert 0.9 * 1280 <= calls <= 1280 + 1e-6  # less what those that left counted since their last landmark
    assert sum(stage.counters["decodes"] for stage in stages) == pytest.approx(320)


def test_what_trials_share_was_made_once(ran: Ran) -> None:
    started = [event.stage.address for event in ran.events if isinstance(event, StageStarted)]
    assert len(started) == len(set(started))
    assert {stage.name for stage in ran.results.shared} == {"data", "meta", "teacher", "split"}


def test_nothing_of_the_sweep_is_left_on_the_cluster(ran: Ran) -> None:
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(board_of(f"{ran.sweep.name}-{ran.sweep.key}"))


def test_tunes_own_results_are_there_as_its_users_know_them(ran: Ran) -> None:
    grid = tuning.grid(ran.sweep, ran.store)
    assert (len(grid), grid.num_errors) == (TRIALS, 0)
    assert ran.results.best is not None
    best = grid.get_best_result(filter_nan_and_inf=True, scope="all")
    assert best.metrics is not None
    assert best.metrics_dataframe is not None
    folders = list((Path(ran.store.root) / ran.sweep.folder / "tune").glob("trial-*"))
    assert len(folders) == TRIALS
    assert all(list(folder.glob("events.out.tfevents*")) for folder in folders)
    by_id = {folder.name.removeprefix("trial-") for folder in folders}
    assert {trial.name for trial in ran.results.trials} == by_id


def test_a_sweep_that_is_complete_runs_nothing_again(ran: Ran) -> None:
    again: list[Event] = []
    assert tuning.run(ran.sweep, ran.store, ran.launcher, on_event=again.append) == ran.results
    assert again == []
    assert on_disk.read(ran.store, ran.sweep) == ran.results


def test_a_sweep_that_was_never_run_has_no_results_of_tune(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no trials at"):
        tuning.grid(small_sweep(tiny), Store(str(tmp_path / "store")))


def test_more_gpus_than_any_node_has_are_refused_before_anything_starts(ran: Ran, tiny: Path, tmp_path: Path) -> None:
    sweep = small_sweep(tiny, settings={"placement.pairs.resources.gpus": 2})
    store = Store(str(tmp_path / "store"))
    with pytest.raises(PlanError, match="2 GPUs"):
        tuning.run(sweep, store, ran.launcher)
    assert not Path(store.root).exists()
