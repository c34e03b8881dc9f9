"""Checkpoints of the ranks: what is checked before DeepSpeed reads one. The whole path runs in tests/chaos."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from m2mkd_ray.errors import ArtifactError, UsageError
from m2mkd_ray.execution.digests import digests
from m2mkd_ray.stages.finetune import RUN_NAME, _set_aside_if_cut
from m2mkd_ray.stages.parts import WEIGHTS
from m2mkd_ray.stages.ranks import STATE, RankJob, Ranks, RankSession

JOB = RankJob(config=None, placement=None, weights=None, relay=None, durable="runs/.partial/finetune-0/durable")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What two ranks with ZeRO 1 left at step 40, merged as Ray Train merges."""
    for rank in range(2):
        (tmp_path / f"shard-{rank}.pt").write_bytes(bytes([rank]) * 100)
        files = digests(tmp_path, skip=[f"shard-{1 - rank}.pt", "hashes-0.json"])
        (tmp_path / f"hashes-{rank}.json").write_text(json.dumps({n: asdict(d) for n, d in files.items()}))
    (tmp_path / STATE).write_text(json.dumps({"step": 40, **asdict(Ranks(2, 1, began_at=123.0))}))
    return tmp_path


def session(num_workers: int = 2, zero_stage: int = 1) -> RankSession:
    return RankSession(JOB, 0, Ranks(num_workers, zero_stage, began_at=456.0), folder=Path("unused"))


def test_the_same_ranks_go_on_and_remember_when_the_first_began(checkpoint: Path) -> None:
    going_on = session()
    going_on._check(checkpoint)
    assert going_on.ranks == Ranks(2, 1, began_at=123.0)


@pytest.mark.parametrize("spoil", [lambda file: file.write_bytes(b"x" * 100), lambda file: file.unlink()])
def test_a_spoilt_checkpoint_is_refused_before_it_is_unpickled(checkpoint: Path, spoil) -> None:
    spoil(checkpoint / "shard-1.pt")
    with pytest.raises(ArtifactError, match=r"below runs/\.partial/finetune-0/durable is spoilt: shard-1\.pt"):
        session()._check(checkpoint)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (session(num_workers=4), r"num_workers=2, but now it is 4.* Go on with 2, or remove that folder"),
        (session(zero_stage=2), r"zero_stage=1, but now it is 2"),
    ],
)
def test_other_ranks_are_told_what_fits(checkpoint: Path, now: RankSession, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        now._check(checkpoint)


def test_a_finished_training_fits_any_ranks(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).write_bytes(b"")
    session(num_workers=4)._check(checkpoint)


@pytest.mark.parametrize(("content", "is_kept"), [('{"checkpoints": []}', True), ('{"checkpo', False), ("", False)])
def test_a_snapshot_that_a_kill_cut_off_is_set_aside(tmp_path: Path, content: str, is_kept: bool) -> None:
    (tmp_path / RUN_NAME).mkdir()
    (tmp_path / RUN_NAME / "checkpoint_manager_snapshot.json").write_text(content)
    _set_aside_if_cut(str(tmp_path))
    assert (tmp_path / RUN_NAME).exists() == is_kept
    assert len(list(tmp_path.glob(f"{RUN_NAME}-cut-*"))) == (not is_kept)


def test_a_fine_tuning_that_never_began_has_nothing_to_set_aside(tmp_path: Path) -> None:
    _set_aside_if_cut(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
