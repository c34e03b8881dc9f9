"""The stage `logits-i`: what the teacher says of every view, written in parts that survive a kill."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from m2mkd_ray.errors import PreemptedError
from m2mkd_ray.execution import Store
from m2mkd_ray.execution.context import Made, Maker
from m2mkd_ray.execution.job import Job, here, job
from m2mkd_ray.execution.worker import run_job
from m2mkd_ray.stages import logits

VIEWS = ("pairs.epochs=2", "pairs.views=2", "pairs.cache={kind: float16}")
STEPS = 2 * 5  # two epochs of 160 rows in batches of 32


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of three steps."""
    monkeypatch.setattr(logits, "_PART_IMAGES", 3 * 32)


def columns(folder: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / "logits.parquet")
    return {name: np.array(table.column(name).to_pylist()) for name in table.column_names}


def test_every_step_of_every_view_is_there_once_and_its_cost_is_told(chain) -> None:
    recipe = chain.with_settings(*VIEWS)
    folder, metrics = recipe.folder("logits-1"), recipe.metrics("logits-1")
    found = columns(folder)
    assert found["step"].tolist() == [step for step in range(STEPS) for _ in range(32)]
    assert metrics["views"] == 2
    assert metrics["bytes"] == (folder / "logits.parquet").stat().st_size
    assert metrics["teacher_calls"] == STEPS * 32
    assert 0 <= metrics["kl_mean"] <= metrics["kl_max"] < 1e-4  # float16 rounds to 11 bits


def test_a_stage_that_was_killed_goes_on_after_its_last_whole_part(
    chain, anew_store: Store, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = chain.with_settings(*VIEWS)
    stage, written = recipe.stage("logits-1"), []
    recipe.lend(anew_store, [stage])
    add = logits._Book.add

    def noted(self: logits._Book, batch: object, values: object) -> None:
        if len(written) == 8 and 8 not in written:
            written.append(8)
            raise KeyboardInterrupt  # as if the process ended: no member's error
        written.append(self.next)
        add(self, batch, values)

    monkeypatch.setattr(logits._Book, "add", noted)
    with pytest.raises(KeyboardInterrupt):
        run_job(job(stage), anew_store, here())
    assert written == [*range(8), 8]
    run_job(job(stage), anew_store, here())
    assert written[9:] == [*range(6, STEPS)]  # two parts of three steps were whole
    whole, resumed = columns(recipe.folder("logits-1")), columns(anew_store.open(stage.address))
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    assert anew_store.manifest(stage.address)["metrics"]["kl_mean"] == pytest.approx(
        recipe.metrics("logits-1")["kl_mean"]
    )


def test_a_part_whose_word_was_cut_is_made_again(chain, anew_store: Store, small_parts: None) -> None:
    """As a full disk leaves it: the file that says that a part is whole is empty."""
    recipe = chain.with_settings(*VIEWS)
    stage = recipe.stage("logits-1")
    recipe.lend(anew_store, [stage])
    with pytest.raises(PreemptedError):
        run_job(job(stage), anew_store, here(), Leaving(at=8))
    said = sorted(Path(anew_store.durable(stage.address)).glob("part-*.json"))
    assert [file.name for file in said] == [f"part-{first:09d}.parquet.json" for first in (0, 3, 6)]
    said[1].write_bytes(b"")
    metrics = run_job(job(stage), anew_store, here())
    assert metrics["teacher_calls"] == (STEPS - 3) * 32
    whole, resumed = columns(recipe.folder("logits-1")), columns(anew_store.open(stage.address))
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


class Leaving:
    """A node of which it is known, when a stage asks for the fourth time, or another, that it goes."""

    def __init__(self, at: int = 4) -> None:
        self.asked, self.at = 0, at

    def has_notice(self) -> bool:
        self.asked += 1
        return self.asked == self.at

    def stream(self, key: str, maker: Maker, start: int, stop: int, consumer: str, workers: int) -> Iterator[Made]:
        make = maker()
        return (Made(make(step), is_own=True) for step in range(start, stop))

    def report(self, job: Job, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        pass


def test_with_notice_that_its_node_goes_it_leaves_at_once_and_no_step_is_lost(
    chain, anew_store: Store, small_parts: None
) -> None:
    recipe = chain.with_settings(*VIEWS)
    stage = recipe.stage("logits-1")
    recipe.lend(anew_store, [stage])
    with pytest.raises(PreemptedError, match="left before step 4 with all parts kept"):
        run_job(job(stage), anew_store, here(), Leaving())
    parts = sorted(file.name for file in Path(anew_store.durable(stage.address)).glob("*.parquet"))
    assert parts == ["part-000000000.parquet", "part-000000003.parquet"]  # one of three steps, one of one
    metrics = run_job(job(stage), anew_store, here())
    assert metrics["teacher_calls"] == (STEPS - 4) * 32
    whole, resumed = columns(recipe.folder("logits-1")), columns(anew_store.open(stage.address))
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_logits_that_a_format_cannot_hold_end_that_pair_alone(chain, anew_store: Store, monkeypatch) -> None:
    from m2mkd_ray.errors import DataError
    from m2mkd_ray.execution import LocalLauncher, execute

    recipe = chain.with_settings(*VIEWS, "placement.pairs.cohort=4")
    stages = [recipe.stage(f"logits-{index}") for index in range(4)]
    recipe.lend(anew_store, stages)
    add = logits._Book.add

    def refused(self: logits._Book, batch: object, values: object) -> None:
        if self.hybrid.index == 2:
            raise DataError("float16 cannot hold 1e6")
        add(self, batch, values)

    monkeypatch.setattr(logits._Book, "add", refused)
    outcome = execute(stages, anew_store, LocalLauncher())
    assert [failure.stage.name for failure in outcome.failed] == ["logits-2"]
    assert {"logits-0", "logits-1", "logits-3"} <= {done.stage.name for done in outcome.complete}


def test_when_all_have_failed_no_further_batch_is_made(chain, anew_store: Store, monkeypatch) -> None:
    from m2mkd_ray.errors import DataError

    recipe = chain.with_settings(*VIEWS)
    stage, asked = recipe.stage("logits-1"), []
    recipe.lend(anew_store, [stage])

    def refused(self: logits._Book, batch: object, values: object) -> None:
        asked.append(self.next)
        raise DataError("float16 cannot hold 1e6")

    class Counting(Leaving):
        def stream(self, *arguments, **settings) -> Iterator[Made]:
            for step, made in enumerate(super().stream(*arguments, **settings)):
                steps.append(step)
                yield made

    steps: list[int] = []
    monkeypatch.setattr(logits._Book, "add", refused)
    with pytest.raises(DataError, match="float16 cannot hold"):
        run_job(job(recipe.stage("logits-1")), anew_store, here(), Counting(at=10**6))
    assert asked == [0]
    assert len(steps) < STEPS
