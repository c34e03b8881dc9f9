"""A checkpoint is whole or passed over."""

from collections.abc import Callable
from pathlib import Path

import pytest

from m2mkd_ray.execution import Store

ADDRESS = "stage-0123456789ab"


def save(store: Store, tmp_path: Path, step: int, text: str = "") -> None:
    files = tmp_path / f"files-{step}-{text}"
    (files / "below").mkdir(parents=True)
    (files / "state").write_text(text or f"state {step}")
    (files / "below" / "more").write_text("more")
    store.checkpoints(ADDRESS).save(step, files)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(entry.name) for entry in (folder / ".partial" / ADDRESS / "checkpoint").iterdir())


def test_there_is_none_at_first(any_store: Store) -> None:
    assert any_store.checkpoints(ADDRESS).latest() is None
    assert any_store.checkpoints(ADDRESS).newest_step() is None


def test_the_newest_is_given_back_and_two_are_kept(
    any_store: Store, tmp_path: Path, folder_of: Callable[[Store], Path]
) -> None:
    for step in (5, 10, 100, 1000):
        save(any_store, tmp_path, step)
    found = any_store.checkpoints(ADDRESS).latest()
    assert found is not None
    step, folder = found
    assert (step, (folder / "state").read_text(), (folder / "below" / "more").read_text()) == (
        1000,
        "state 1000",
        "more",
    )
    assert steps_in(folder_of(any_store)) == [100, 1000]
    assert any_store.checkpoints(ADDRESS).newest_step() == 1000


@pytest.mark.parametrize("spoil", ["change", "truncate", "no file", "no manifest", "half a manifest"])
def test_one_that_is_not_whole_is_passed_over(
    any_store: Store,
    tmp_path: Path,
    folder_of: Callable[[Store], Path],
    spoil: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save(any_store, tmp_path, 1)
    save(any_store, tmp_path, 2)
    newer = folder_of(any_store) / ".partial" / ADDRESS / "checkpoint" / "000000000002"
    match spoil:
        case "change":
            (newer / "state").write_text("STATE 2")
        case "truncate":
            (newer / "state").write_text("st")
        case "no file":
            (newer / "state").unlink()
        case "no manifest":
            (newer / "manifest.json").unlink()
        case "half a manifest":
            (newer / "manifest.json").write_text('{"files": {"sta')
    found = any_store.checkpoints(ADDRESS).latest()
    assert found is not None
    assert (found[0], (found[1] / "state").read_text()) == (1, "state 1")
    assert "of stage-0123456789ab is not whole" in caplog.text


def test_saving_a_step_again_replaces_it(any_store: Store, tmp_path: Path) -> None:
    save(any_store, tmp_path, 1, "old")
    save(any_store, tmp_path, 1, "new")
    found = any_store.checkpoints(ADDRESS).latest()
    assert found is not None
    assert (found[1] / "state").read_text() == "new"


def test_the_folder_that_was_given_is_gone(any_store: Store, tmp_path: Path) -> None:
    save(any_store, tmp_path, 1)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("files-")] == []


def test_one_that_cannot_be_kept_leaves_nothing_half_written(
    any_store: Store, tmp_path: Path, folder_of: Callable[[Store], Path]
) -> None:
    unfinished = folder_of(any_store) / ".partial" / ADDRESS
    unfinished.mkdir(parents=True)
    (unfinished / "checkpoint").write_text("in the way")
    with pytest.raises(OSError, match="checkpoint"):
        save(any_store, tmp_path, 1)
    assert list(tmp_path.rglob("state")) == []
    assert list(tmp_path.rglob("out-*")) == []
