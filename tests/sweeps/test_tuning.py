"""A sweep on a local Ray: trials share a cohort, ASHA stops some, and what ends equals what would have been alone."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.util import placement_group_table
from small_sweeps import small_sweep, stage_of, state_of

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


@dataclass
class Ran:
    """A sweep that was run."""

    sweep: Sweep
    store: Store
    launcher: RayLauncher
    results: SweepResults
    events: list[Event]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """Eight trials in one cohort on a local Ray of two cores."""
    folder = tmp_path_factory.mktemp("sweep")
    store, sweep = Store(str(folder / "store")), small_sweep(folder)
    ray_folder = Path("/tmp") / f"m2s-{os.getpid()}"  # short: sockets in it have at most 107 bytes
    launcher = RayLauncher(num_cpus=2, temp_dir=str(ray_folder))
    events: list[Event] = []
    try:
        yield Ran(sweep, store, launcher, tuning.run(sweep, store, launcher, on_event=events.append), events)
    finally:
        launcher.close()
        shutil.rmtree(ray_folder, ignore_errors=True)


def bits(folder: Path) -> str:
    return hashlib.sha256((folder / "module.safetensors").read_bytes()).hexdigest()


def test_asha_stops_trials_and_the_others_come_to_their_end(ran: Ran) -> None:
    trials = ran.results.trials
    assert [dict(trial.point) for trial in trials] == drawn(ran.sweep)
    assert {trial.state for trial in trials} == {"complete", "stopped"}
    assert all([epoch for epoch, _ in trial.history] == [1, 2, 3, 4] for trial in trials if trial.state == "complete")
    assert all(trial.epochs in (1, 2) and "asha" in trial.why for trial in trials if trial.state == "stopped")
    assert ran.results.best is not None
    assert ran.results.best.value == max(trial.value or 0.0 for trial in trials if trial.state == "complete")


def test_decisions_are_those_of_the_rule_in_the_order_of_the_trials(ran: Ran) -> None:
    """ASHA by hand (Li et al. 2020; Tune's cutoff is the median of those before, as reduction is 2)."""
    import numpy as np

    stopped = {}
    for rung in (1.0, 2.0, 4.0):
        seen: list[float] = []
        for number, trial in enumerate(ran.results.trials):
            value = dict(trial.history).get(rung)
            if value is None:
                continue
            if seen and value < np.percentile(seen, 50) and rung < 4:
                stopped[number] = rung
            seen.append(value)
    found = {number: t.epochs for number, t in enumerate(ran.results.trials) if t.state == "stopped"}
    assert found == stopped


def test_all_were_members_of_one_cohort(ran: Ran) -> None:
    started = [e for e in ran.events if isinstance(e, StageStarted) and e.stage.name == "pair-1"]
    assert len(started) == 8
    assert {len(event.where["cohort"]) for event in started} == {8}


def test_trials_that_ended_equal_their_stages_run_alone_bit_for_bit(ran: Ran, tmp_path: Path) -> None:
    ended = [trial for trial in ran.results.trials if trial.state == "complete"]
    stages = [stage_of(ran.sweep, trial) for trial in ended]
    alone = Store(str(tmp_path / "alone"))
    for need in {need.address for stage in stages for need in stage.reads.values()}:
        shutil.copytree(Path(ran.store.root) / need, Path(alone.root) / need)
    execute(stages[:2], alone, LocalLauncher()).raise_for_failures()
    for trial, stage in list(zip(ended, stages, strict=True))[:2]:
        assert bits(alone.open(stage.address)) == bits(ran.store.open(stage.address))
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
    assert (len(grid), grid.num_errors) == (8, 0)
    assert ran.results.best is not None
    best = grid.get_best_result(filter_nan_and_inf=True, scope="all")
    assert best.metrics is not None
    assert best.metrics_dataframe is not None
    folders = list((Path(ran.store.root) / ran.sweep.folder / "tune").glob("trial-*"))
    assert len(folders) == 8
    assert all(list(folder.glob("events.out.tfevents*")) for folder in folders)
    by_id = {folder.name.removeprefix("trial-") for folder in folders}
    assert {trial.name for trial in ran.results.trials} == by_id


def test_a_sweep_that_is_complete_runs_nothing_again(ran: Ran) -> None:
    again: list[Event] = []
    assert tuning.run(ran.sweep, ran.store, ran.launcher, on_event=again.append) == ran.results
    assert again == []
    assert on_disk.read(ran.store, ran.sweep) == ran.results


def test_a_sweep_that_was_never_run_has_no_results_of_tune(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no trials at"):
        tuning.grid(small_sweep(tmp_path), Store(str(tmp_path / "store")))


def test_more_gpus_than_any_node_has_are_refused_before_anything_starts(ran: Ran, tmp_path: Path) -> None:
    sweep = small_sweep(tmp_path, settings={"placement.pairs.resources.gpus": 2})
    store = Store(str(tmp_path / "store"))
    with pytest.raises(PlanError, match="2 GPUs"):
        tuning.run(sweep, store, ran.launcher)
    assert not Path(store.root).exists()


def test_the_clock_ends_a_sweep_in_order(ran: Ran, tmp_path: Path) -> None:
    """Shared stages are lent, so that the budget is spent on trials that would take minutes."""
    settings = {"pairs.epochs": 4000, "placement.pairs.checkpoint_every_s": 0.2}
    budget = {"trials": 3, "hours": 25 / 3600}
    sweep = small_sweep(tmp_path, settings=settings, budget=budget, scheduler="none", cohort=3)
    store = Store(str(tmp_path / "store"))
    for stage in ran.results.shared:
        shutil.copytree(Path(ran.store.root) / stage.address, Path(store.root) / stage.address)
    found = tuning.run(sweep, store, ran.launcher)
    assert found.state == "complete"
    assert "budget.hours" in found.why
    assert {trial.state for trial in found.trials} == {"stopped"}
    assert any(trial.value is not None for trial in found.trials)
    assert [state_of(sweep, trial, store) for trial in found.trials] == ["partial"] * 3
