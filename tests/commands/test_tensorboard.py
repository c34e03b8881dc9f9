"""Curves for TensorBoard: of complete trainings, of those under way, from any store, each step once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs

from m2mkd_ray.commands.session import chosen, planned
from m2mkd_ray.commands.tensorboard import Curves
from m2mkd_ray.execution import Stage, Store
from m2mkd_ray.execution.store import Progress
from m2mkd_ray.reporting.scalars import read

HISTORY = [{"step": step, "epoch": step / 4, "loss": 4.0 / step, "images_per_s": 64.0} for step in range(1, 9)]


@pytest.fixture
def meta(tiny: Path) -> Stage:
    return next(stage for stage in planned(chosen(str(tiny), [])) if stage.name == "meta")


@pytest.fixture(params=["local", "remote"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store on the disk, and one that is only reached through pyarrow, as a bucket is."""
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    (tmp_path / "bucket").mkdir()
    filesystem = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    return Store("store", filesystem=filesystem, cache=str(tmp_path / "cache"))


def steps(curves: Curves, tag: str = "training/loss") -> list[int]:
    return [step for found, step, _ in read(curves.board.folder) if found == tag]


def say(store: Store, stage: Stage, step: int) -> None:
    point = {name: value for name, value in HISTORY[step - 1].items() if name != "step"}
    store.say_progress(stage.address, Progress(step, 8, point, 0.0, 1, "here"))


def checkpoint(store: Store, stage: Stage, step: int, folder: Path) -> None:
    folder.mkdir()
    (folder / "history.json").write_text(json.dumps([*HISTORY[:step], {"step": step, "epoch": 1.0, "val_top1": 0.5}]))
    store.checkpoints(stage.address).save(step, folder)


def commit(store: Store, stage: Stage) -> None:
    out = store.scratch(stage.address)
    (out / "history.json").write_text(json.dumps(HISTORY))
    store.commit(stage.address, out, {"metrics": {}, "ended": "now"})


def test_a_training_is_followed_through_a_retry_to_its_end(any_store: Store, meta: Stage, tmp_path: Path) -> None:
    curves = Curves(meta, tmp_path / "boards")
    assert (curves.update(any_store), curves.is_complete) == (0, False)
    say(any_store, meta, 3)
    curves.update(any_store)
    checkpoint(any_store, meta, 4, tmp_path / "checkpoint")
    say(any_store, meta, 6)
    curves.update(any_store)
    assert steps(curves) == [3, 4, 6]
    assert steps(curves, "training/val_top1") == [4]
    for step in (5, 6, 7):  # tried again from the checkpoint, followed by another process
        say(any_store, meta, step)
        curves.close()
        curves = Curves(meta, tmp_path / "boards")
        curves.update(any_store)
    assert steps(curves) == [3, 4, 6, 7]
    commit(any_store, meta)
    assert curves.update(any_store) == 2 * 4  # loss and speed of steps 1, 2, 5 and 8
    assert (steps(curves), curves.is_complete) == (list(range(1, 9)), True)
    assert Curves(meta, tmp_path / "boards").update(any_store) == 0


def test_a_history_that_is_not_whole_yet_is_read_later(meta: Stage, tmp_path: Path) -> None:
    store, curves = Store(str(tmp_path / "store")), Curves(meta, tmp_path / "boards")
    checkpoint(store, meta, 4, tmp_path / "checkpoint")
    (file,) = Path(store.root).glob(".partial/*/checkpoint/*/history.json")
    whole = file.read_text()
    file.write_text(whole[:-3])
    assert curves.update(store) == 0
    file.write_text(whole)
    curves.update(store)
    curves.close()
    assert steps(curves) == [1, 2, 3, 4]


def test_the_command_writes_what_histories_say(tiny: Path, m2mkd, tmp_path: Path) -> None:
    store, boards = tmp_path / "runs", tmp_path / "boards"
    assert m2mkd("tensorboard", tiny, "--store", store, "--to", boards).out.startswith("0 trainings, 0 new values.")
    assert not boards.exists()
    assert m2mkd("run", tiny, "--store", store, "--launcher", "local", "--until", "pair-0").code == 0
    said = m2mkd("tensorboard", tiny, "--store", store, "--to", boards)
    assert f"tensorboard --logdir {boards}" in said.out
    histories = {file.parent.name: json.loads(file.read_text()) for file in store.glob("*/history.json")}
    assert {address.rpartition("-")[0] for address in histories} == {"meta", "teacher", "pair-0"}
    assert said.out.startswith("3 trainings")
    for address, history in histories.items():
        losses = [(point["step"], pytest.approx(point["loss"])) for point in history if "loss" in point]
        written = read(boards / "demo" / address)
        assert [(step, value) for tag, step, value in written if tag == "training/loss"] == losses
        assert {tag for tag, *_ in written} >= {"counters/images_per_s", "counters/data_wait", "training/lr"}
    again = m2mkd("tensorboard", tiny, "--store", store, "--to", boards).out
    assert again.startswith("3 trainings, 0 new values.")


def test_a_folder_that_cannot_be_written_is_said(tiny: Path, meta: Stage, m2mkd, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    say(store, meta, 3)
    (tmp_path / "taken").write_text("")
    ended = m2mkd("tensorboard", tiny, "--store", store.root, "--to", tmp_path / "taken")
    assert ended.code == 1
    assert "Event files cannot be written" in ended.err
    assert "--to" in ended.err


@pytest.mark.slow
def test_following_ends_with_the_run(tiny: Path, m2mkd, tmp_path: Path) -> None:
    store, boards = tmp_path / "runs", tmp_path / "boards"
    command = [sys.executable, "-m", "m2mkd_ray", "run", str(tiny), "--launcher", "local", "--store", str(store)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        ended = m2mkd("tensorboard", tiny, "--store", store, "--to", boards, "--follow")
        assert run.wait(60) == 0
    assert ended.out.startswith("6 trainings")
    assert len(list(boards.glob("**/events.out.tfevents.*"))) == 6
