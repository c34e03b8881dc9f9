"""An open run takes stages in and lets others go, and nobody else is the worse for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from toy import Pace, cohort, expected_state, number, raise_value_error, slow_chain

from m2mkd_ray.errors import LockedError
from m2mkd_ray.execution import (
    Event,
    Launcher,
    LocalLauncher,
    Outcome,
    Requests,
    Stage,
    StageEnded,
    StageFailed,
    StageProgress,
    StageStarted,
    StageWithdrawn,
    Store,
    execute,
)
from m2mkd_ray.execution.locks import Locks, owner_of
from m2mkd_ray.execution.ray_launcher import RayLauncher


class Opened:
    """An open run in a thread, and what it told."""

    def __init__(self, store: Store, launcher: Launcher, on_event: Callable[[Event], None]) -> None:
        self.requests, self.events = Requests(), list[Event]()
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self._on_event = on_event
        self._thread = threading.Thread(target=self._run, args=(store, launcher))
        self._thread.start()

    def _run(self, store: Store, launcher: Launcher) -> None:
        try:
            self.outcome = execute((), store, launcher, on_event=self._hear, requests=self.requests)
        except BaseException as error:
            self.error = error

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        self._on_event(event)

    def heard(self, kind: type, stage: Stage) -> list[Event]:
        """Events of a kind about a stage."""
        return [event for event in self.events if isinstance(event, kind) and event.stage.address == stage.address]

    def wait_for(self, kind: type, stage: Stage, times: int = 1) -> Event:
        """The event, when it was told of so many times."""
        deadline = time.monotonic() + 60
        while len(found := self.heard(kind, stage)) < times:
            assert self.error is None, self.error
            assert time.monotonic() < deadline, f"no {kind.__name__} of {stage.name}: {self.events}"
            time.sleep(0.01)
        return found[-1]

    def end(self) -> Outcome:
        """Close it and wait for what is left."""
        self.requests.close()
        self._thread.join(timeout=60)
        assert self.outcome is not None, self.error
        return self.outcome


@contextmanager
def opened(store: Store, launcher: Launcher, on_event: Callable[[Event], None] = lambda _: None) -> Iterator[Opened]:
    run = Opened(store, launcher, on_event)
    try:
        yield run
    finally:
        run.requests.close()
        run._thread.join(timeout=60)


def test_stages_are_added_while_it_runs_and_each_is_run_once(store: Store) -> None:
    first, journal = number("first"), Pace(journal=f"{store.root}.journal")
    above = number("above", 2, journal, a=first)
    with opened(store, LocalLauncher()) as run:
        run.requests.add([first])
        run.wait_for(StageEnded, first)
        run.requests.add([above])
        run.wait_for(StageEnded, above)
        run.requests.add([above, number("other", 5, journal, a=above)])
        outcome = run.end()
    assert {done.stage.name: done.metrics["total"] for done in outcome.complete} == {
        "first": 1,
        "above": 3,
        "other": 8,
    }
    assert Path(journal.journal).read_text().splitlines() == ["add 2", "add 5"]


def test_a_run_that_is_open_waits_for_requests(store: Store) -> None:
    with opened(store, LocalLauncher()) as run:
        time.sleep(0.7)
        assert run.outcome is None
        assert run.end().complete == ()


def test_nothing_is_added_to_a_run_that_is_closed() -> None:
    requests = Requests()
    requests.close()
    with pytest.raises(RuntimeError, match="closed"):
        requests.add([number("late")])


def test_one_that_waits_is_withdrawn_with_what_reads_it(store: Store) -> None:
    busy, waiting = number("busy"), number("waiting", 2)
    below = number("below", 3, a=waiting)
    run: Opened

    def withdraw(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage.name == "busy":
            run.requests.withdraw([waiting.address])

    with opened(store, LocalLauncher(), withdraw) as run:
        run.requests.add([busy, below])
        run.wait_for(StageWithdrawn, below)
        outcome = run.end()
    assert [end.stage.name for end in outcome.withdrawn] == ["waiting", "below"]
    assert [end.stage.name for end in outcome.complete] == ["busy"]
    assert store.status(waiting.address).state == "absent"
    assert owner_of(store, waiting.address) is None


def test_one_that_was_withdrawn_or_failed_may_be_added_again(store: Store) -> None:
    waiting = number("waiting", 2)
    failing = Stage("failing", raise_value_error, number("x").config)
    with opened(store, LocalLauncher()) as run:
        run.requests.add([failing, waiting])
        run.requests.withdraw([waiting.address])
        run.wait_for(StageWithdrawn, waiting)
        run.wait_for(StageFailed, failing)
        run.requests.add([failing, waiting])
        run.wait_for(StageEnded, waiting)
        run.wait_for(StageFailed, failing, times=2)
        outcome = run.end()
    assert (len(outcome.complete), len(outcome.failed), len(outcome.withdrawn)) == (1, 1, 0)


def test_what_another_driver_computes_is_not_added(store: Store) -> None:
    stage = number("theirs")
    with Locks(store) as locks:
        locks.acquire([stage.address])
        with opened(store, LocalLauncher()) as run:
            run.requests.add([stage])
            run._thread.join(timeout=30)
            assert isinstance(run.error, LockedError)


def test_a_run_that_is_cancelled_ends_as_if_interrupted(store: Store) -> None:
    with opened(store, LocalLauncher()) as run:
        run.requests.cancel()
        run._thread.join(timeout=30)
    assert isinstance(run.error, KeyboardInterrupt)


@pytest.mark.ray
def test_a_member_that_is_withdrawn_leaves_alone_and_goes_on_from_its_checkpoint(
    launcher: RayLauncher, store: Store
) -> None:
    first, second, third = cohort([60, 60, 60], placement=Pace(sleep_s=0.05))
    with opened(store, launcher) as run:
        run.requests.add([first, second, third])
        run.wait_for(StageProgress, second)
        run.requests.withdraw([second.address])
        left = run.wait_for(StageWithdrawn, second)
        assert isinstance(left, StageWithdrawn)
        assert left.step is not None
        assert not run.heard(StageEnded, first), "the others are at work"
        assert store.attempts(second.address)[-1]["outcome"] == "WITHDRAWN"
        assert owner_of(store, second.address) is None
        run.wait_for(StageEnded, third)
        run.requests.add([second])
        run.wait_for(StageEnded, second)
        outcome = run.end()
    started = run.heard(StageStarted, second)
    assert [event.from_step for event in started if isinstance(event, StageStarted)] == [None, left.step]
    for stage in (first, second, third):
        assert outcome.metrics[stage.address]["state"] == expected_state(stage.config)
    assert len(store.manifest(first.address)["attempts"]) == 1
    assert len(store.manifest(first.address)["progress"]["landmarks"]) == 60


@pytest.mark.ray
def test_one_that_does_not_leave_its_worker_is_ended(
    launcher: RayLauncher, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.changes._WITHDRAW_S", 0.2)
    deaf = number("deaf", placement=Pace(sleep_s=600))
    with opened(store, launcher) as run:
        run.requests.add([deaf])
        run.wait_for(StageStarted, deaf)
        run.requests.withdraw([deaf.address])
        run.wait_for(StageWithdrawn, deaf)
        other = slow_chain(tmp_path / "journal", steps=2)
        run.requests.add([other])
        run.wait_for(StageEnded, other)
