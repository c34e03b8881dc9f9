"""What is half-written when a process is killed."""

from pathlib import Path

import pytest
from toy import Number, Pace, raise_value_error

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


def test_the_folder_of_a_killed_process_goes_to_its_successor_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed = own_folder("/shared/runs/.partial/finetune-0/durable", "rank-0")
    (killed.__enter__() / "shard").write_text("ha")  # and no end
    with (
        own_folder("/shared/runs/.partial/finetune-0/durable", "rank-0") as again,
        own_folder("/shared/runs/.partial/finetune-0/durable", "rank-1") as mate,
        own_folder("/shared/runs/.partial/finetune-1/durable", "rank-0") as other,
    ):
        assert len({again, mate, other}) == 3
        assert list(again.iterdir()) == []
    assert list(tmp_path.rglob("*/*")) == []
