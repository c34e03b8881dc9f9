"""What is half-written when a process is killed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs
from toy import Number, Pace, raise_value_error, remote_store

from m2mkd_ray.errors import StoreError
from m2mkd_ray.execution import Stage, Store
from m2mkd_ray.execution.job import here, job
from m2mkd_ray.execution.scratch import own_folder
from m2mkd_ray.execution.worker import run_job


def test_what_a_killed_worker_left_goes_when_its_stage_starts_again(any_store: Store, tmp_path: Path) -> None:
    stage = Stage("unlucky", raise_value_error, Number(), placement=Pace())
    checkpoints = any_store.checkpoints(stage.address)
    kept = checkpoints.scratch()
    (kept / "state").write_text("whole")
    checkpoints.save(3, kept)
    left = [any_store.scratch(stage.address), checkpoints.scratch()]
    for folder in left:
        (folder / "half").write_text("ha")
    with pytest.raises(ValueError, match="unlucky"):
        run_job(job(stage), any_store, here())
    assert not any(folder.exists() for folder in left)
    assert list(tmp_path.rglob("half")) == []
    assert checkpoints.newest_step() == 3


def test_other_stages_keep_what_they_are_writing(any_store: Store) -> None:
    other, unlucky = any_store.scratch("other-000000000000"), Stage("unlucky", raise_value_error, Number())
    with pytest.raises(ValueError, match="unlucky"):
        run_job(job(unlucky), any_store, here())
    assert other.exists()


WORKER = """
import sys, time
from pathlib import Path
from toy import remote_store
from m2mkd_ray.execution.scratch import own_folder

left = [remote_store(Path(sys.argv[1])).scratch("one-000000000000")]
with own_folder("rank-0") as folder:
    for each in (*left, folder):
        (each / "half").write_text("ha")
    print("at work", flush=True)
    time.sleep(600)
"""


def test_what_a_process_left_goes_when_it_is_dead_and_another_stage_starts_on_the_node(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store, environment = remote_store(tmp_path), {**environment, "TMPDIR": str(tmp_path)}
    other = Stage("other", raise_value_error, Number())

    def half_written_beside_another_stage() -> int:
        with own_folder("rank-0") as folder:
            assert list(folder.iterdir()) == []
        with pytest.raises(ValueError, match="unlucky"):
            run_job(job(other), store, here())
        return len(list(tmp_path.rglob("half")))

    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "at work\n"
            assert half_written_beside_another_stage() == 2, "it lives"
        finally:
            worker.kill()
    assert half_written_beside_another_stage() == 0
    assert len(list(tmp_path.rglob("process-*"))) == 2, "this process's alone"


def test_a_process_leaves_nothing_at_its_end(tmp_path: Path, environment: dict[str, str]) -> None:
    done = WORKER.replace("time.sleep(600)", "")
    subprocess.run(
        [sys.executable, "-c", done, str(tmp_path)], env={**environment, "TMPDIR": str(tmp_path)}, check=True
    )
    assert list(tmp_path.rglob("process-*")) == []


def test_folders_of_one_process_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with own_folder("logits") as one, own_folder("logits") as other:
        assert one != other
        shutil.rmtree(one.parent)  # as who cleans the disk of what is old
        with own_folder("logits") as again:
            assert again.is_dir()
    assert not again.exists()


def a_link(folder: Path) -> None:
    folder.with_name("elsewhere").mkdir(mode=0o700)
    folder.symlink_to("elsewhere")


def of_another_user(folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    folder.mkdir(mode=0o700)
    os.chown(folder, 4321, -1)


def of_everybody(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (a_link, "it is a symbolic link to elsewhere"),
        (Path.touch, "it is no folder"),
        (of_another_user, "it is uid 4321's"),
        (of_everybody, r"others may write to it \(`drwxrwxrwx`\)"),
    ],
)
def test_a_folder_that_another_user_may_have_made_is_refused(
    make: Callable[[Path], None], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch, cache = (tmp_path / f"m2mkd-{name}-{os.getuid()}" for name in ("scratch", "cache"))
    make(scratch)
    with pytest.raises(StoreError, match=rf"m2mkd-scratch-.*{found}.*removed, or set TMPDIR"), own_folder("a"):
        pass
    scratch.rename(cache)
    with pytest.raises(StoreError, match=rf"m2mkd-cache-.*{found}.*removed, or set TMPDIR"):
        _ = Store("store", filesystem=fs.LocalFileSystem()).folders
    assert Store(str(tmp_path / "store")).folders.names("") == [], "a local store has no cache"


def test_nobody_else_may_look_into_folders_that_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with own_folder("a") as folder:
        for _ in range(2):  # one that is there already is taken as well
            _ = Store("store", filesystem=fs.LocalFileSystem()).folders
        private = [*folder.parents[:2], tmp_path / f"m2mkd-cache-{os.getuid()}"]
        assert [oct(each.stat().st_mode & 0o777) for each in private] == ["0o700"] * 3
