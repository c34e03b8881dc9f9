"""An artifact is whole or not there, whatever happens, and what was spoilt is found."""

import errno
import os
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from toy import remote_store

from m2mkd_ray.errors import ArtifactError, StoreError
from m2mkd_ray.execution import Store
from m2mkd_ray.execution.digests import sha256
from m2mkd_ray.execution.folders import why
from m2mkd_ray.execution.store import Progress, now

ADDRESS = "stage-0123456789ab"
FILES = {"a.txt": "alpha", "below/b.txt": "beta"}


def manifest(**metrics: float) -> dict[str, Any]:
    return {"name": "stage", "metrics": metrics, "ended": now(), "seconds": 2.5}


def prepare(store: Store, files: dict[str, str] | None = None) -> Path:
    prepared = store.scratch(ADDRESS)
    for name, text in (files or FILES).items():
        (prepared / name).parent.mkdir(exist_ok=True)
        (prepared / name).write_text(text)
    return prepared


def commit(store: Store) -> None:
    store.commit(ADDRESS, prepare(store), manifest(top1=0.5))


def contents(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in FILES}


def test_what_was_committed_can_be_opened(any_store: Store) -> None:
    assert any_store.status(ADDRESS).state == "absent"
    assert any_store.commit(ADDRESS, prepare(any_store), manifest(top1=0.5)) == {"top1": 0.5}
    assert any_store.status(ADDRESS, verify=True).state == "complete"
    assert contents(any_store.open(ADDRESS)) == FILES
    assert any_store.manifest(ADDRESS)["files"]["a.txt"]["size"] == 5
    assert any_store.seconds(["stage", "other"]) == {"stage": 2.5}


def test_prepared_files_without_a_commit_are_no_artifact(any_store: Store) -> None:
    prepare(any_store)
    assert any_store.status(ADDRESS).state == "absent"
    with pytest.raises(ArtifactError, match=r"is not complete .* has no manifest"):
        any_store.open(ADDRESS)


def test_unfinished_work_is_partial_and_goes_with_the_commit(any_store: Store, tmp_path: Path) -> None:
    any_store.say_progress(ADDRESS, Progress(3, 10, {"loss": 0.5}, 0.0, 1, "here"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "state").write_text("x")
    any_store.checkpoints(ADDRESS).save(3, tmp_path / "files")
    status = any_store.status(ADDRESS)
    assert status.state == "partial"
    assert status.progress is not None
    assert status.progress.step == 3
    commit(any_store)
    assert any_store.progress(ADDRESS) is None
    assert any_store.checkpoints(ADDRESS).latest() is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "a.txt is missing"),
        (lambda file: file.write_text("alp"), "a.txt has 3 bytes, expected 5"),
    ],
    ids=["missing", "truncated"],
)
def test_wrong_sizes_are_found_at_a_look(
    any_store: Store, folder_of: Callable[[Store], Path], spoil: Callable[[Path], None], message: str
) -> None:
    commit(any_store)
    spoil(folder_of(any_store) / ADDRESS / "a.txt")
    status = any_store.status(ADDRESS)
    assert (status.state, status.problems) == ("spoilt", (message,))


def test_changed_contents_are_found_before_they_are_read(any_store: Store, folder_of: Callable[[Store], Path]) -> None:
    commit(any_store)
    (folder_of(any_store) / ADDRESS / "a.txt").write_text("ALPHA")
    assert any_store.status(ADDRESS).state == "complete"
    assert any_store.status(ADDRESS, verify=True).state == "spoilt"
    with pytest.raises(ArtifactError, match=r"is spoilt: a.txt has sha256 .* will be put in quarantine"):
        any_store.open(ADDRESS)


def test_files_are_hashed_once_while_they_stay_as_they_are(store: Store) -> None:
    commit(store)
    file = store.open(ADDRESS) / "a.txt"
    first = sha256(file)
    before = os.stat(file)
    file.write_text("ALPHA")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sha256(file) == first  # same size and time: not read again
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert sha256(file) != first


def test_a_spoilt_copy_of_a_remote_artifact_is_fetched_again(tmp_path: Path) -> None:
    store = remote_store(tmp_path)
    commit(store)
    (store.open(ADDRESS) / "a.txt").write_text("ALPHA")
    assert contents(store.open(ADDRESS)) == FILES


def test_who_commits_second_leaves_the_first_in_place(any_store: Store) -> None:
    one, two = prepare(any_store), prepare(any_store, {"a.txt": "other"})
    any_store.commit(ADDRESS, one, manifest(top1=0.5))
    assert any_store.commit(ADDRESS, two, manifest(top1=0.9)) == {"top1": 0.5}
    assert contents(any_store.open(ADDRESS)) == FILES


def test_a_folder_without_a_manifest_is_replaced(any_store: Store, folder_of: Callable[[Store], Path]) -> None:
    (folder_of(any_store) / ADDRESS).mkdir(parents=True)
    (folder_of(any_store) / ADDRESS / "stale.txt").write_text("from a broken copy")
    assert any_store.status(ADDRESS).state == "absent"
    commit(any_store)
    assert sorted(any_store.folders.sizes(ADDRESS)) == ["a.txt", "below/b.txt", "manifest.json"]


def test_quarantine_moves_the_artifact_and_says_so(
    any_store: Store, folder_of: Callable[[Store], Path], caplog: pytest.LogCaptureFixture
) -> None:
    commit(any_store)
    any_store.quarantine(ADDRESS, "a.txt is missing")
    assert any_store.status(ADDRESS).state == "absent"
    (moved,) = (folder_of(any_store) / ".quarantine").iterdir()
    assert (moved / "a.txt").read_text() == "alpha"
    assert "is spoilt (a.txt is missing); moved to" in caplog.text


@pytest.mark.parametrize("left", [b"", b"\0" * 64, b'{"metrics": {'], ids=["empty", "zeroes", "half"])
def test_a_manifest_that_cannot_be_read_is_spoilt_and_costs_no_checkpoint(
    any_store: Store, folder_of: Callable[[Store], Path], tmp_path: Path, left: bytes
) -> None:
    commit(any_store)
    (folder_of(any_store) / ADDRESS / "manifest.json").write_bytes(left)  # a power cut
    status = any_store.status(ADDRESS)
    assert (status.state, status.problems) == ("spoilt", ("manifest.json cannot be read",))
    (tmp_path / "files").mkdir()
    any_store.checkpoints(ADDRESS).save(3, tmp_path / "files")
    with pytest.raises(ArtifactError, match="its manifest cannot be read"):
        commit(any_store)
    assert any_store.checkpoints(ADDRESS).newest_step() == 3
    any_store.quarantine(ADDRESS, *status.problems)
    commit(any_store)
    assert contents(any_store.open(ADDRESS)) == FILES
    assert any_store.checkpoints(ADDRESS).newest_step() is None


def test_a_manifest_is_on_disk_before_its_artifact_has_a_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, bool]] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, store.folders.names(ADDRESS) != []))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    commit(store)
    root = Path(store.root)
    inodes = [(root / ADDRESS / "manifest.json").stat().st_ino, (root / ADDRESS).stat().st_ino, root.stat().st_ino]
    assert synced == [(inodes[0], False), (inodes[1], False), (inodes[2], True)]


def test_a_missing_file_is_an_error_of_the_artifact(any_store: Store, folder_of: Callable[[Store], Path]) -> None:
    commit(any_store)
    (folder_of(any_store) / ADDRESS / "a.txt").unlink()
    with pytest.raises(ArtifactError, match=r"is spoilt: a.txt is missing"):
        any_store.open(ADDRESS)


def test_verifying_leaves_the_copy_alone_that_others_read(any_store: Store) -> None:
    commit(any_store)
    read_by_another = any_store.open(ADDRESS)
    before = (read_by_another / "a.txt").stat()
    others = sorted(read_by_another.parent.iterdir())
    assert any_store.status(ADDRESS, verify=True).state == "complete"
    assert (read_by_another / "a.txt").stat().st_ino == before.st_ino
    assert sorted(read_by_another.parent.iterdir()) == others


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_has_not_is_refused_before_anything_is_put(any_store: Store, value: float) -> None:
    any_store.say_progress(ADDRESS, Progress(1, 2, {}, 0.0, 1, "here"))
    with pytest.raises(StoreError, match=rf"`{ADDRESS}` was not committed.*metrics.top1 is {value}"):
        any_store.commit(ADDRESS, prepare(any_store), manifest(top1=value))
    assert any_store.status(ADDRESS).state == "partial"


def test_drop_leaves_nothing(any_store: Store) -> None:
    any_store.say_progress(ADDRESS, Progress(1, 2, {}, 0.0, 1, "here"))
    commit(any_store)
    any_store.drop(ADDRESS)
    assert any_store.status(ADDRESS).state == "absent"
    assert any_store.addresses() == {}


def test_a_store_pickles(any_store: Store) -> None:
    commit(any_store)
    assert contents(pickle.loads(pickle.dumps(any_store)).open(ADDRESS)) == FILES


def test_a_file_uri_is_the_local_store(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    commit(store)
    assert store.is_local
    assert contents(Store(str(tmp_path / "store")).open(ADDRESS)) == FILES


def test_a_uri_of_no_known_kind_is_refused() -> None:
    with pytest.raises(StoreError, match=r"`gopher://x` cannot be opened.*s3://"):
        Store("gopher://x").probe()


def test_half_written_progress_counts_as_none(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.folders.write(f".partial/{ADDRESS}/progress.json", b'{"step": 3, "tot')
    assert store.status(ADDRESS).state == "absent"
    assert "is not JSON" in caplog.text


# Death at any line


class Death(BaseException):
    """What a kill is to code: nothing after it runs."""


def dies_at(line: int, work: Callable[[], object]) -> bool:
    """Work until that many lines of the store's code have run; whether it came so far."""
    before = sys.gettrace()
    sys.settrace(death_at(line))
    try:
        work()
    except Death:
        return True
    finally:
        sys.settrace(before)
    return False


def death_at(line: int) -> Callable[..., Any]:
    """A trace function that raises before that line of the store's code, counted as they run."""
    left = line

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if "m2mkd_ray/execution" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Death
        return trace

    return trace


# A death may leave files open; the process would be gone with them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_commit_that_dies_at_any_line_leaves_all_or_nothing(tmp_path: Path, kind: str) -> None:
    states: list[str] = []
    while True:
        folder = tmp_path / str(len(states))
        folder.mkdir()
        store = Store(str(folder)) if kind == "local" else remote_store(folder)
        store.say_progress(ADDRESS, Progress(1, 2, {}, 0.0, 1, "here"))
        dies = dies_at(len(states) + 1, partial(store.commit, ADDRESS, prepare(store), manifest(top1=0.5)))
        states.append(store.status(ADDRESS, verify=True).state)
        assert states[-1] in ("partial", "complete")
        commit(store)  # another one is not hindered
        assert contents(store.open(ADDRESS)) == FILES
        if not dies:
            break
    assert len(states) > 30
    assert states == sorted(states, reverse=True)  # partial, …, partial, complete, …, complete


# Stores that cannot be written


def test_a_good_store_passes_the_probe_and_nothing_is_left(
    any_store: Store, folder_of: Callable[[Store], Path]
) -> None:
    any_store.probe()
    assert list(folder_of(any_store).iterdir()) == []


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_the_way_of_the_store_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("I was here first")
    with pytest.raises(StoreError, match=r"a file is in the way at .*delete it or choose another folder"):
        Store(f"{tmp_path}/file{below}").probe()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_place_where_nobody_can_write_is_refused() -> None:
    with pytest.raises(StoreError, match=r"The store `/proc/m2mkd` cannot be written"):
        Store("/proc/m2mkd").probe()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space is left at `/x`; free some"),
        (errno.EROFS, "the file system of `/x` is read-only"),
        (errno.EACCES, "this user may not write at `/x`"),
        (errno.ENOENT, "no folder can be made at `/x`; choose another folder"),
        (errno.EIO, "Input/output error at `/x`"),
    ],
)
def test_an_error_of_the_system_becomes_advice(number: int, message: str) -> None:
    assert message in why(OSError(number, os.strerror(number), "/x"), "/x")


def test_an_error_without_a_file_name_names_the_store() -> None:
    assert "no space is left at `s3://bucket`" in why(OSError(errno.ENOSPC, "No space left"), "s3://bucket")
