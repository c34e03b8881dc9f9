"""A sweep whose driver and workers are killed comes to the same end, and repeats no trial that had ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_sweeps import small_sweep, stage_of

from m2mkd_ray.execution import Store
from m2mkd_ray.sweeps import results
from m2mkd_ray.sweeps.results import SweepResults
from m2mkd_ray.sweeps.sweep import Sweep

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

SWEEPS = Path(__file__).parents[1] / "sweeps"
DRIVER = """
import sys, tempfile
from pathlib import Path
from small_sweeps import small_sweep
from m2mkd_ray.execution import Store
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.sweeps import tuning
if __name__ == "__main__":
    folder, root, epochs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    with tempfile.TemporaryDirectory(prefix="m2-", ignore_cleanup_errors=True) as ray_folder:
        launcher = RayLauncher(num_cpus=2, temp_dir=ray_folder)
        try:
            tuning.run(small_sweep(folder, settings={"pairs.epochs": epochs}), Store(root), launcher)
        finally:
            launcher.close()
"""
EPOCHS = 12
TIMEOUT_S = 240


def start(folder: Path, store: Store) -> subprocess.Popen[bytes]:
    paths = f"{SWEEPS}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    with (folder / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder), store.root, str(EPOCHS)],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def wait_until(holds: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert driver.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def now(store: Store, sweep: Sweep) -> SweepResults | None:
    there = store.folders.read(f"{sweep.folder}/{results.FILE}") is not None
    return results.read(store, sweep) if there else None


def most_epochs(store: Store, sweep: Sweep) -> float:
    found = now(store, sweep)
    return max((trial.epochs for trial in found.trials), default=0.0) if found else 0.0


def end_of(driver: subprocess.Popen[bytes], folder: Path) -> None:
    assert driver.wait(timeout=TIMEOUT_S) == 0, (folder / "driver.log").read_text()[-3000:]


def test_a_killed_sweep_goes_on_to_the_same_best_and_repeats_nothing_that_ended(tmp_path: Path) -> None:
    sweep = small_sweep(tmp_path, settings={"pairs.epochs": EPOCHS})
    killed, log = Store(str(tmp_path / "killed")), tmp_path / "driver.log"

    first = start(tmp_path, killed)
    wait_until(lambda: most_epochs(killed, sweep) >= 3, first, log)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = now(killed, sweep)
    assert before is not None
    stopped = {trial.name: trial for trial in before.trials if trial.state == "stopped"}
    assert stopped, "ASHA stopped trials at the first rungs, before the driver was killed"
    shared = {record.address: killed.manifest(record.address)["ended"] for record in before.shared}

    second = start(tmp_path, killed)
    running = [trial for trial in before.trials if trial.state == "running"]

    def worker() -> int | None:
        for trial in running:
            attempts = killed.attempts(stage_of(sweep, trial).address)
            if attempts and attempts[-1]["ended"] is None and len(attempts) > 1 and most_epochs(killed, sweep) >= 5:
                return int(attempts[-1]["where"]["pid"])
        return None

    wait_until(lambda: worker() is not None, second, log)
    pid = worker()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    end_of(second, tmp_path)

    found = now(killed, sweep)
    assert found is not None
    assert found.state == "complete"
    assert len(found.trials) == 8
    by_name = {trial.name: trial for trial in found.trials}
    for name, trial in stopped.items():
        assert by_name[name].history == trial.history, "what had ended was left as it was"
    assert {address: killed.manifest(address)["ended"] for address in shared} == shared

    outcomes = {
        trial.name: [attempt["outcome"] for attempt in killed.manifest(stage_of(sweep, trial).address)["attempts"]]
        for trial in found.trials
        if trial.state == "complete"
    }
    assert all(each[-1] == "COMPLETE" for each in outcomes.values())
    assert any(each == ["LOST", "LOST", "COMPLETE"] for each in outcomes.values()), outcomes

    whole = Store(str(tmp_path / "whole"))
    end_of(start(tmp_path, whole), tmp_path)
    undisturbed = now(whole, sweep)
    assert undisturbed is not None
    assert undisturbed.best is not None
    assert found.best is not None
    assert json.dumps(dict(found.best.point)) == json.dumps(dict(undisturbed.best.point))
    assert found.best.history == undisturbed.best.history
    assert [(trial.state, trial.history) for trial in found.trials] == [
        (trial.state, trial.history) for trial in undisturbed.trials
    ]
