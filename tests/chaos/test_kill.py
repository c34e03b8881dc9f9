"""Real stages, really killed: a run that lost workers or its driver ends with the same bits as one that did not."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from autoscaling import command_of, parent_of
from small import SMALL, Killer, hashes, small_demo

from m2mkd_ray.execution import Event, LocalLauncher, StageProgress, Store, execute
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.pipeline import plan

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

QUICK_RANKS = (
    "finetune.epochs=16",
    "finetune.validate_every_epochs=null",
    "placement.finetune.checkpoint_every_s=0.5",
)
"""A checkpoint soon, after which there is time enough to kill a rank, and nothing else that takes long."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The pairs of the small demo, trained one after another in this process."""
    store = Store(str(tmp_path_factory.mktemp("undisturbed")))
    execute(plan(small_demo()), store, LocalLauncher(), until=["pair-0", "pair-1"]).raise_for_failures()
    return store


@pytest.fixture(scope="module")
def launcher() -> Iterator[RayLauncher]:
    with tempfile.TemporaryDirectory(prefix="m2-", ignore_cleanup_errors=True) as folder:
        launcher = RayLauncher(num_cpus=2, temp_dir=folder)
        yield launcher
        launcher.close()


def test_a_pair_whose_worker_is_killed_ends_with_the_same_weights(
    undisturbed: Store, launcher: RayLauncher, tmp_path: Path
) -> None:
    store, recipe, killer = Store(str(tmp_path / "store")), small_demo(), Killer("pair-0", step=20)
    outcome = execute(plan(recipe), store, launcher, until=["pair-0", "pair-1"], on_event=killer)
    outcome.raise_for_failures()
    assert killer.killed_at is not None
    assert killer.retried == ["pair-0"]  # pair-1 went on alone
    (pair,) = (stage for stage in plan(recipe) if stage.name == "pair-0")
    attempts = store.manifest(pair.address)["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["LOST", "COMPLETE"]
    names = {"pair-0", "pair-1", "meta", "teacher"}
    for file, of in (
        ("module.safetensors", {"pair-0", "pair-1"}),
        ("model.safetensors", names - {"pair-0", "pair-1"}),
    ):
        assert hashes(store, recipe, of, file) == hashes(undisturbed, recipe, of, file)


def test_a_killed_driver_started_again_runs_only_the_rest(undisturbed: Store, tmp_path: Path) -> None:
    recipe, root = small_demo(), tmp_path / "store"
    command = [sys.executable, "-m", "m2mkd_ray", "run", "demo", "--store", str(root), "--launcher", "local"]
    command += ["--until", "pair-0", "--until", "pair-1", "--json"]
    command += [part for setting in (*SMALL, "placement.finetune.engine=torch") for part in ("--set", setting)]
    (pair,) = (stage for stage in plan(recipe) if stage.name == "pair-0")
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    checkpoints = root / ".partial" / pair.address / "checkpoint"
    deadline = time.monotonic() + 120
    while not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    outcomes = {stage["name"]: stage["outcome"] for stage in json.loads(again.stdout)["stages"]}
    assert outcomes["meta"] == outcomes["teacher"] == outcomes["split"] == "reused"
    assert outcomes["pair-0"] == outcomes["pair-1"] == "complete"
    attempts = Store(str(root)).manifest(pair.address)["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["LOST", "COMPLETE"]
    pairs = {"pair-0", "pair-1"}
    assert hashes(Store(str(root)), recipe, pairs, "module.safetensors") == hashes(
        undisturbed, recipe, pairs, "module.safetensors"
    )


def test_a_killed_rank_of_the_fine_tuning_goes_on_from_its_checkpoint(launcher: RayLauncher, tmp_path: Path) -> None:
    """Ray Train starts the ranks again; DeepSpeed's shards and the weights come back bit for bit."""
    recipe = small_demo("start=scratch", *QUICK_RANKS)
    whole, broken = Store(str(tmp_path / "whole")), Store(str(tmp_path / "broken"))
    execute(plan(recipe), whole, launcher, until=["finetune"]).raise_for_failures()
    (stage,) = (stage for stage in plan(recipe) if stage.name == "finetune")
    killed: list[int] = []

    def kill_a_rank(event: Event) -> None:
        durable = Path(broken.root) / ".partial" / stage.address / "durable" / "ranks"
        is_training = isinstance(event, StageProgress) and event.stage.name == "finetune"
        if is_training and not killed and any(durable.glob("checkpoint_*")):
            killed.append(_kill_one_rank())

    execute(plan(recipe), broken, launcher, until=["finetune"], on_event=kill_a_rank).raise_for_failures()
    assert killed
    file = "model.safetensors"
    assert hashes(broken, recipe, {"finetune"}, file) == hashes(whole, recipe, {"finetune"}, file)


def _kill_one_rank() -> int:
    """Kill one rank of Ray Train among the processes below this one; its pid."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and "RayTrainWorker" in command_of(process) and _is_below_this(int(process.name)):
            os.kill(int(process.name), signal.SIGKILL)
            return int(process.name)
    raise AssertionError("no rank of Ray Train was found")


def _is_below_this(pid: int) -> bool:
    while pid > 1 and pid != os.getpid():
        pid = parent_of(pid)
    return pid == os.getpid()
