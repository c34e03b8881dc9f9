"""Checkpoints that are written beside the training."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from m2mkd_ray.execution import Store
from m2mkd_ray.training.saving import Saver

ADDRESS = "training-000000000000"


class Writes:
    """State that may be written when it is told to."""

    def __init__(self, text: str, *, at_once: bool = True) -> None:
        self.text, self.may = text, threading.Event()
        if at_once:
            self.may.set()

    def __call__(self, folder: Path) -> None:
        assert self.may.wait(30)
        (folder / "state.pt").write_text(self.text)


def test_the_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    checkpoints = Store(str(tmp_path)).checkpoints(ADDRESS)
    saver, slow, history = Saver(checkpoints, beside=True), Writes("one", at_once=False), [{"step": 1.0}]
    saver.save(1, slow, history)
    history.append({"step": 2.0})
    assert checkpoints.newest_step() is None
    slow.may.set()
    saver.save(2, Writes("two"), history)  # waits for the first
    assert checkpoints.newest_step() in (1, 2)
    saver.wait()
    assert checkpoints.newest_step() == 2
    first = checkpoints._folders.root / checkpoints._path / f"{1:012d}"
    assert json.loads((first / "history.json").read_text()) == [{"step": 1.0}], "as it was then"
    saver.close()


def test_an_error_of_a_write_is_told_by_the_next_call(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError("no space left")

    saver = Saver(Store(str(tmp_path)).checkpoints(ADDRESS), beside=True)
    saver.save(1, fail, [])
    with pytest.raises(OSError, match="no space left"):
        saver.save(2, Writes("two"), [])
    saver.wait()
    saver.close()


@pytest.mark.parametrize("beside", [True, False])
def test_what_a_failed_write_left_is_removed_and_the_error_is_told(tmp_path: Path, beside: bool) -> None:
    def fill(folder: Path) -> None:
        (folder / "state.pt").write_text("ha")
        raise OSError("no space left")

    store = Store(str(tmp_path))
    saver = Saver(store.checkpoints(ADDRESS), beside=beside)

    def save(step: int, write: Callable[[Path], None]) -> None:
        saver.save(step, write, [])
        saver.wait()

    with pytest.raises(OSError, match="no space left"):
        save(1, fill)
    (tmp_path / ".partial" / ADDRESS / "checkpoint").write_text("in the way")
    with pytest.raises(OSError, match="checkpoint"):
        save(2, Writes("written, but not kept"))
    assert [file.name for file in tmp_path.rglob("*") if file.name not in (".partial", ADDRESS)] == ["checkpoint"]
    saver.close()


def test_ranks_write_at_once(tmp_path: Path) -> None:
    checkpoints = Store(str(tmp_path)).checkpoints(ADDRESS)
    Saver(checkpoints, beside=False).save(3, Writes("three"), None)
    found = checkpoints.latest()
    assert found is not None
    assert found[0] == 3
    assert not (found[1] / "history.json").exists()


KILLED_IN_MID_WRITE = """
import os, sys
from pathlib import Path
from m2mkd_ray.execution import Store
from m2mkd_ray.training.saving import Saver

def whole(folder: Path) -> None:
    (folder / "state.pt").write_text("whole")

def cut(folder: Path) -> None:
    (folder / "state.pt").write_text("ha")
    os._exit(9)

saver = Saver(Store(sys.argv[1]).checkpoints("training-000000000000"), beside=True)
saver.save(1, whole, [])
saver.save(2, cut, [])
saver.wait()
"""


@pytest.mark.slow
def test_a_process_that_is_killed_in_mid_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    store, environment = Store(str(tmp_path / "store")), {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-c", KILLED_IN_MID_WRITE, store.root]
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode == 9
    assert list((tmp_path / "tmp").rglob("state.pt")) == [], "what is cut lies where it is removed with its stage"
    found = store.checkpoints(ADDRESS).latest()
    assert found is not None
    assert found[0] == 1
    assert (found[1] / "state.pt").read_text() == "whole"
