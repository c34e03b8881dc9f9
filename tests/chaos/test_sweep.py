"""A sweep that is interrupted, and loses its driver and a worker, ends as an undisturbed one and repeats no trial."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_sweeps import bits, lent, of_point, small_sweep, stage_of, stopped_by_hand

from m2mkd_ray.execution import LocalLauncher, Store, execute
from m2mkd_ray.sweeps import results
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.results import SweepResults, TrialRecord
from m2mkd_ray.sweeps.sweep import Sweep, to_yaml

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

TRIALS, EPOCHS, RUNG = 4, 64, 2
TIMEOUT_S = 300
STOP_S = 30
"""An interrupted sweep ends within about two seconds where nothing else is at work."""


class Command:
    """`m2mkd sweep` of a file in a process of its own, as a terminal starts it."""

    def __init__(self, sweep: Sweep, store: Store, folder: Path) -> None:
        self.log, file = folder / "driver.log", folder / "sweep.yaml"
        file.write_text(to_yaml(sweep))
        command = [sys.executable, "-m", "m2mkd_ray", "sweep", str(file), "--num-cpus", "2", "--store", store.root]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait, as long as it runs."""
        deadline = time.monotonic() + TIMEOUT_S
        while not holds():
            assert self._process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def interrupt(self) -> int:
        """Ctrl-C, which reaches the whole group of processes; gives the exit code."""
        os.killpg(self._process.pid, signal.SIGINT)
        return self._process.wait(timeout=STOP_S)

    def kill(self) -> None:
        """Kill the driver alone."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """Wait for its end; gives the exit code."""
        return self._process.wait(timeout=TIMEOUT_S)

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def said(self) -> str:
        """The end of what it and those before it said."""
        return self.log.read_text()[-3000:]


def now(store: Store, sweep: Sweep) -> SweepResults | None:
    there = store.folders.read(f"{sweep.folder}/{results.FILE}") is not None
    return results.read(store, sweep) if there else None


def most_epochs(store: Store, sweep: Sweep) -> float:
    found = now(store, sweep)
    return max((trial.epochs for trial in found.trials), default=0.0) if found else 0.0


def at_work(store: Store, sweep: Sweep) -> set[int]:
    """The processes that reported last of the trials that go on."""
    found = now(store, sweep)
    trials = [trial for trial in found.trials if trial.state == "running"] if found else []
    said = [store.progress(stage_of(sweep, trial).address) for trial in trials]
    return {progress.pid for progress in said if progress is not None}


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def sweep(tiny: Path) -> Sweep:
    settings = {"pairs.epochs": EPOCHS, "pairs.validate_every_epochs": RUNG}
    asha = {"kind": "asha", "grace": RUNG, "reduction": 2}
    return small_sweep(tiny, settings=settings, scheduler=asha, budget={"trials": TRIALS}, cohort=TRIALS)


@pytest.fixture(scope="module")
def whole(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """All trials trained to their ends in this process, without Ray."""
    store = Store(str(tmp_path_factory.mktemp("whole")))
    pairs = [stage for point in drawn(sweep) or () for stage in of_point(sweep, point)]
    execute(pairs, store, LocalLauncher()).raise_for_failures()
    return store


def history_in(store: Store, sweep: Sweep, trial: TrialRecord) -> dict[float, float]:
    """Values by epoch of a trial that was trained to its end."""
    marks = store.manifest(stage_of(sweep, trial).address)["progress"]["landmarks"]
    return {mark["epoch"]: mark["val_top1"] for mark in marks if "val_top1" in mark}


def test_a_sweep_goes_on_after_an_interrupt_a_killed_driver_and_a_killed_worker(
    sweep: Sweep, whole: Store, tmp_path: Path
) -> None:
    frozen = [address for name, found in whole.addresses().items() if name != "pair-1" for address in found]
    store = lent(whole, frozen, tmp_path / "store")
    shared = {address: store.manifest(address)["ended"] for address in frozen}

    with Command(sweep, store, tmp_path) as first:
        first.wait_until(lambda: most_epochs(store, sweep) >= 2 * RUNG)
        (worker,) = seen = at_work(store, sweep)
        assert first.interrupt() == 130, first.said
    assert not is_alive(worker)
    interrupted = now(store, sweep)
    assert interrupted is not None
    assert interrupted.state == "running"
    ended = {trial.name: trial for trial in interrupted.trials if trial.state == "stopped"}
    assert ended, "ASHA stopped trials at the first rungs, before the interrupt"

    with Command(sweep, store, tmp_path) as second:
        second.wait_until(lambda: bool(at_work(store, sweep) - seen))
        seen |= at_work(store, sweep)
        second.kill()

    with Command(sweep, store, tmp_path) as third:
        third.wait_until(lambda: bool(at_work(store, sweep) - seen))
        (worker,) = at_work(store, sweep) - seen
        os.kill(worker, signal.SIGKILL)
        assert third.end() == 0, third.said

    found = now(store, sweep)
    assert found is not None
    assert (found.state, len(found.trials)) == ("complete", TRIALS)
    by_name = {trial.name: trial for trial in found.trials}
    assert {name: by_name[name].history for name in ended} == {name: trial.history for name, trial in ended.items()}
    outcomes = [
        [attempt["outcome"] for attempt in store.manifest(stage_of(sweep, trial).address)["attempts"]]
        for trial in found.trials
        if trial.state == "complete"
    ]
    assert all(each[-1] == "COMPLETE" for each in outcomes)
    assert ["INTERRUPTED", "LOST", "LOST", "COMPLETE"] in outcomes
    assert {address: store.manifest(address)["ended"] for address in frozen} == shared
    assert_as_undisturbed(found, sweep, whole, store)


def assert_as_undisturbed(found: SweepResults, sweep: Sweep, whole: Store, store: Store) -> None:
    """Decisions, values and weights are those of trainings that nobody disturbed, judged by ASHA's rule by hand."""
    histories = [history_in(whole, sweep, trial) for trial in found.trials]
    stopped = stopped_by_hand(histories, EPOCHS, grace=RUNG)
    assert [dict(trial.point) for trial in found.trials] == drawn(sweep)
    for number, (trial, values) in enumerate(zip(found.trials, histories, strict=True)):
        last = stopped.get(number, EPOCHS)
        assert trial.state == ("stopped" if number in stopped else "complete")
        assert dict(trial.history) == {epoch: value for epoch, value in values.items() if epoch <= last}
    complete = [trial for trial in found.trials if trial.state == "complete"]
    assert found.best is not None
    assert found.best.value == max(history_in(whole, sweep, trial)[EPOCHS] for trial in complete)
    address = stage_of(sweep, found.best).address
    assert bits(store, address) == bits(whole, address)
