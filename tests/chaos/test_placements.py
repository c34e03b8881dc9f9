"""Real pairs on a real Ray, placed in every way and disturbed: the same bits as one after another in one process."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import PAIRS, Killer, beginning, hashes, small_demo

from m2mkd_ray.execution import Event, LocalLauncher, StageProgress, Store, execute
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.pipeline import plan

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

FILE = "module.safetensors"
VIEWS = ("pairs.views=4", "pairs.epochs=12", "placement.pairs.micro_batch=32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The pairs alone, one after another in this process, a lane at a time."""
    store = Store(str(tmp_path_factory.mktemp("plain")))
    execute(plan(small_demo(*VIEWS)), store, LocalLauncher(), until=PAIRS).raise_for_failures()
    return store


@pytest.fixture(scope="module")
def launcher() -> Iterator[RayLauncher]:
    with tempfile.TemporaryDirectory(prefix="m2-", ignore_cleanup_errors=True) as folder:
        launcher = RayLauncher(num_cpus=4, temp_dir=folder)
        yield launcher
        launcher.close()


def test_cohorts_that_share_batches_and_read_exact_logits_and_lose_a_worker(
    plain: Store, launcher: RayLauncher, tmp_path: Path
) -> None:
    """Two cohorts of two on one node, whose batches are made once for both; the first one's worker is killed."""
    recipe = small_demo(
        *VIEWS, "pairs.cache={kind: float32}", "placement.pairs.cohort=2", "placement.pairs.share_feed=true"
    )
    store, killer = beginning(plain, recipe, tmp_path / "store"), Killer("pair-0", step=20)
    execute(plan(recipe), store, launcher, until=PAIRS, on_event=killer).raise_for_failures()
    assert killer.killed_at is not None
    assert len(killer.retried) == 2  # the whole cohort, and nobody else
    stages = {stage.name: stage for stage in plan(recipe)}
    for name in PAIRS:
        manifest = store.manifest(stages[name].address)
        assert manifest["metrics"].get("teacher_calls", 0) == 0
        assert [attempt["outcome"] for attempt in manifest["attempts"]] == (
            ["LOST", "COMPLETE"] if name in killer.retried else ["COMPLETE"]
        )
    assert hashes(store, recipe, set(PAIRS), FILE) == hashes(plain, small_demo(*VIEWS), set(PAIRS), FILE)


def test_pairs_side_by_side_share_their_batches(plain: Store, launcher: RayLauncher, tmp_path: Path) -> None:
    """Four workers on one node: together they make hardly more batches than one of them would."""
    recipe = small_demo(*VIEWS, "placement.pairs.share_feed=true")
    store = beginning(plain, recipe, tmp_path / "store")
    execute(plan(recipe), store, launcher, until=PAIRS).raise_for_failures()
    assert hashes(store, recipe, set(PAIRS), FILE) == hashes(plain, recipe, set(PAIRS), FILE)
    stages = {stage.name: stage for stage in plan(recipe)}
    metrics = [store.manifest(stages[name].address)["metrics"] for name in PAIRS]
    own = sum(one["own_batches"] for one in metrics)
    assert own < metrics[0]["steps"]


def test_a_pair_on_two_ranks_ends_with_the_bits_of_one(plain: Store, launcher: RayLauncher, tmp_path: Path) -> None:
    """A rank a lane against one process that takes lane by lane."""
    recipe = small_demo(*VIEWS, "placement.pairs.ranks=2")
    store = beginning(plain, recipe, tmp_path / "store")
    execute(plan(recipe), store, launcher, until=["pair-1"]).raise_for_failures()
    assert hashes(store, recipe, {"pair-1"}, FILE) == hashes(plain, small_demo(*VIEWS), {"pair-1"}, FILE)


def test_a_pair_that_was_killed_on_two_ranks_goes_on_on_one(
    plain: Store, launcher: RayLauncher, tmp_path: Path
) -> None:
    recipe = small_demo(*VIEWS, "placement.pairs.ranks=2")
    store = beginning(plain, recipe, tmp_path / "store")
    (pair,) = (stage for stage in plan(recipe) if stage.name == "pair-1")

    def stop_after_a_checkpoint(event: Event) -> None:
        is_training = isinstance(event, StageProgress) and event.stage.name == "pair-1"
        if is_training and store.checkpoints(pair.address).newest_step():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan(recipe), store, launcher, until=["pair-1"], on_event=stop_after_a_checkpoint)
    assert store.checkpoints(pair.address).newest_step()
    execute(plan(small_demo(*VIEWS)), store, launcher, until=["pair-1"]).raise_for_failures()
    assert len(store.manifest(pair.address)["attempts"]) == 2
    assert hashes(store, recipe, {"pair-1"}, FILE) == hashes(plain, small_demo(*VIEWS), {"pair-1"}, FILE)
