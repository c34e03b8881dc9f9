"""The torch engine over several ranks of a process group: the same training, shared out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from histories import without_measures

from m2mkd_ray.execution import Store


def train(folder: Path, world: int, **settings: Any) -> dict[int, Any]:
    """Train on `world` ranks, each a process; what became of both pairs, as rank 0 has it."""
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("left-*"), *folder.glob("meeting")):
        old.unlink()
    script = Path(__file__).parent / "torch_ranks.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), json.dumps(settings)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(said)
    ended: dict[int, Any] = torch.load(folder / "ended-0.pt", weights_only=True)
    return ended


def assert_bit_equal(ours: dict[int, Any], theirs: dict[int, Any]) -> None:
    assert sorted(ours) == sorted(theirs) == [0, 1]
    for place in ours:
        one, other = ours[place], theirs[place]
        assert without_measures(one["history"]) == without_measures(other["history"])
        assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Both pairs by one rank, in micro-batches of a lane."""
    return train(tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.slow
def test_two_ranks_end_bit_equal_to_one(by_one: dict[int, Any], tmp_path: Path) -> None:
    """A part p of rank r is part r + 2p of one rank: the same images, drop path and sum of gradients."""
    assert_bit_equal(train(tmp_path, 2), by_one)
    assert Store(str(tmp_path / "pair-0")).checkpoints("training-000000000000").newest_step() == 5


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_training_goes_on_with_another_number_of_ranks(
    before: int, after: int, by_one: dict[int, Any], tmp_path: Path
) -> None:
    for world, at in ((before, 3), (after, None)):
        ended = train(tmp_path, world, at=at)
    assert_bit_equal(ended, by_one)


@pytest.mark.slow
def test_ranks_that_see_different_checkpoints_all_say_so(tmp_path: Path) -> None:
    train(tmp_path, 2, at=3)
    assert train(tmp_path, 2, blind=True) == {}
    for rank in range(2):
        assert "their newest checkpoints are of steps [3, 0]" in (tmp_path / f"refused-{rank}.txt").read_text()


@pytest.mark.slow
def test_a_loss_that_one_rank_sees_spoilt_ends_that_member_on_all(by_one: dict[int, Any], tmp_path: Path) -> None:
    ended = train(tmp_path, 2, spoilt=True)
    others = torch.load(tmp_path / "ended-1.pt", weights_only=True)
    assert "not finite at step 0" in ended[1]["error"]
    assert "not finite at step 0" in others[1]["error"]
    assert without_measures(ended[0]["history"]) == without_measures(by_one[0]["history"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_ranks_train_in_bf16_as_one_does_within_rounding(precision: str, tmp_path: Path) -> None:
    one, two = (train(tmp_path / str(world), world, precision=precision) for world in (1, 2))
    for place in one:
        torch.testing.assert_close(two[place]["weights"], one[place]["weights"], rtol=0.1, atol=0.02)
