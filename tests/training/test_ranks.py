"""The torch engine over several ranks of a process group: the same training, shared out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from histories import without_measures

from m2mkd_ray.execution import Store

pytestmark = pytest.mark.slow

Ended = dict[int, Any]
"""What became of both pairs: weights, history, error."""


def train(folder: Path, world: int, trainings: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Train on `world` ranks, each a process, one training after another, each in its folder."""
    folder.mkdir(exist_ok=True)
    script = Path(__file__).parent / "torch_ranks.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), json.dumps(trainings)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(said)


def ended(folder: Path, rank: int = 0) -> Ended:
    found: Ended = torch.load(folder / f"ended-{rank}.pt", weights_only=True)
    return found


def assert_bit_equal(ours: Ended, theirs: Ended) -> None:
    assert sorted(ours) == sorted(theirs) == [0, 1]
    for place in ours:
        one, other = ours[place], theirs[place]
        assert without_measures(one["history"]) == without_measures(other["history"])
        assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


ROUNDED = [(precision, {"precision": precision}) for precision in ("bf16", "bf16_pure")]
CUT: tuple[str, dict[str, Any]] = ("cut", {"at": 3})


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By one rank, in micro-batches of a lane."""
    folder = tmp_path_factory.mktemp("one")
    train(folder, 1, [("whole", {}), CUT, *ROUNDED])
    return folder


@pytest.fixture(scope="module")
def two(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By two ranks; `goes-on` takes up what was cut by one."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(one / "cut", folder / "goes-on")
    blind = ("cut", {"blind": True})
    train(folder, 2, [("whole", {}), ("goes-on", {}), CUT, *ROUNDED, blind, ("spoilt", {"spoilt": True})])
    return folder


def test_two_ranks_end_bit_equal_to_one(one: Path, two: Path) -> None:
    """A part p of rank r is part r + 2p of one rank: the same images, drop path and sum of gradients."""
    assert_bit_equal(ended(two / "whole"), ended(one / "whole"))
    assert Store(str(two / "whole" / "pair-0")).checkpoints("training-000000000000").newest_step() == 5


def test_a_training_that_one_rank_began_goes_on_with_two(one: Path, two: Path) -> None:
    assert ended(one / "cut") == {}
    assert_bit_equal(ended(two / "goes-on"), ended(one / "whole"))


def test_a_training_that_two_ranks_began_goes_on_with_one(one: Path, two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "cut", tmp_path / "goes-on")
    train(tmp_path, 1, [("goes-on", {})])
    assert_bit_equal(ended(tmp_path / "goes-on"), ended(one / "whole"))


def test_ranks_that_see_different_checkpoints_all_say_so(two: Path) -> None:
    assert ended(two / "cut") == {}
    for rank in range(2):
        assert "their newest checkpoints are of steps [3, 0]" in (two / "cut" / f"refused-{rank}.txt").read_text()


def test_a_loss_that_one_rank_sees_spoilt_ends_that_member_on_all(one: Path, two: Path) -> None:
    first, others = (ended(two / "spoilt", rank) for rank in range(2))
    assert "not finite at step 0" in first[1]["error"]
    assert "not finite at step 0" in others[1]["error"]
    assert without_measures(first[0]["history"]) == without_measures(ended(one / "whole")[0]["history"])


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_ranks_train_in_bf16_as_one_does_within_rounding(precision: str, one: Path, two: Path) -> None:
    alone, together = ended(one / precision), ended(two / precision)
    for place in alone:
        torch.testing.assert_close(together[place]["weights"], alone[place]["weights"], rtol=0.1, atol=0.02)
