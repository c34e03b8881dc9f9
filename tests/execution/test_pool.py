"""Workers that stay warm: who takes which seat, who is ended, and what their deaths cost."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import ray.util
import toy
from toy import Chain, Number, Pace, chain, cohort, expected_state, is_alive, number, wait_until_gone

from m2mkd_ray.execution import (
    Event,
    GiveUp,
    Kind,
    Resources,
    Retry,
    Stage,
    StageEnded,
    StageInterrupted,
    StageProgress,
    StageRetried,
    StageStarted,
    Store,
    execute,
)
from m2mkd_ray.execution.job import job
from m2mkd_ray.execution.pool import Pool, Shape
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.execution.reports import Finished, Report, Started

pytestmark = pytest.mark.ray


@pytest.fixture
def make_pool(launcher: RayLauncher) -> Iterator[Callable[..., Pool]]:
    """Pools on the local Ray, with no worker of others in their way."""
    launcher._pool.close()
    pools: list[Pool] = []

    def make(keep_idle_s: float = 30.0) -> Pool:
        pools.append(Pool(keep_idle_s, prewarm=["wave", "no_such_module"]))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def poll_until(pool: Pool, is_over: Callable[[list[Report]], bool]) -> list[Report]:
    """All reports until something is true of them."""
    reports: list[Report] = []
    deadline = time.monotonic() + 120
    while not is_over(reports):
        assert time.monotonic() < deadline, reports
        reports += pool.poll(0.1)
    return reports


def ends(count: int) -> Callable[[list[Report]], bool]:
    return lambda reports: sum(not isinstance(report, Started) for report in reports) == count


def pid_of(store: Store, stage: Stage) -> int:
    return store.manifest(stage.address)["where"]["pid"]


WHOLE = Resources(cpus=2)
"""One such worker fills the local Ray."""


def test_a_worker_that_is_free_takes_the_next_stage_of_its_shape(launcher: RayLauncher, store: Store) -> None:
    first = number("first")
    plan = [first, number("second", 2, a=first), number("third", 3, a=first)]
    execute(plan, store, launcher).raise_for_failures()
    assert pid_of(store, plan[1]) == pid_of(store, first) or pid_of(store, plan[2]) == pid_of(store, first)
    later = number("later")
    execute([later], store, launcher).raise_for_failures()
    assert pid_of(store, later) in {pid_of(store, stage) for stage in plan}


def test_an_idle_worker_is_ended_for_a_stage_of_another_shape(launcher: RayLauncher, store: Store) -> None:
    small = number("small")
    large = Stage("large", toy.say_where, Number(), {"a": small}, resources=WHOLE)
    outcome = execute([small, large], store, launcher)
    assert pid_of(store, large) != pid_of(store, small)
    assert outcome.metrics[large.address]["threads"] == "2"
    assert not is_alive(pid_of(store, small))


def test_stages_are_bound_late_and_longest_first_by_one_worker(launcher: RayLauncher, store: Store) -> None:
    seconds = {"short": 0.1, "long": 0.6, "middle": 0.3}
    stages = [
        Stage(name, toy.add, Number(), placement=Pace(sleep_s=s), resources=WHOLE) for name, s in seconds.items()
    ]
    execute(stages, store, launcher).raise_for_failures()
    order: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, StageStarted):
            order.append(event.stage.name)

    again = [Stage(name, toy.add, Number(value=2), resources=WHOLE) for name in seconds]
    execute(again, store, launcher, on_event=note).raise_for_failures()
    assert order == ["long", "middle", "short"]
    assert len({pid_of(store, stage) for stage in [*stages, *again]}) == 1


def test_as_many_workers_are_asked_for_as_seats_wait_and_no_more(make_pool: Callable[..., Pool], store: Store) -> None:
    pool = make_pool()
    stages = [Stage(f"n-{i}", toy.add, Number(value=i), resources=WHOLE) for i in range(4)]
    for stage in stages:
        pool.submit([job(stage)], store, Shape(WHOLE, None))
    pool.poll(0.0)
    assert len(pool._workers) == 4  # so much an autoscaler sees
    poll_until(pool, ends(4))
    assert len(pool._workers) == 1
    assert len({pid_of(store, stage) for stage in stages}) == 1


def test_seats_that_nobody_has_taken_are_recalled(make_pool: Callable[..., Pool], store: Store) -> None:
    pool = make_pool()
    one, two, three = (
        Stage(f"n-{i}", toy.add, Number(value=i), placement=Pace(sleep_s=1.0), resources=WHOLE) for i in range(3)
    )
    pool.submit([job(one)], store, Shape(WHOLE, None))
    pool.submit([job(two), job(three)], store, Shape(WHOLE, None))
    poll_until(pool, lambda reports: any(isinstance(report, Started) for report in reports))
    assert pool.recall([one.address, two.address]) == {two.address, three.address}
    reports = poll_until(pool, ends(1))
    assert [report.address for report in reports] == [one.address]
    assert len(pool._workers) == 1  # the one that was on its way for them was withdrawn


def test_a_worker_is_not_used_again_after_an_unexpected_error(make_pool: Callable[..., Pool], store: Store) -> None:
    pool = make_pool()
    pids = []
    for run in (toy.raise_training_error, toy.raise_value_error, toy.run_out_of_memory, toy.raise_training_error):
        stage = Stage("bad", run, Number(value=len(pids)))
        pool.submit([job(stage)], store, Shape(stage.resources, None))
        started = next(report for report in poll_until(pool, ends(1)) if isinstance(report, Started))
        pids.append(started.where["pid"])
    assert pids[0] == pids[1]  # after an error of ours it was
    assert len(set(pids)) == 3
    for pid in pids[1:3]:
        wait_until_gone(pid)


def test_a_worker_imports_while_it_is_idle(make_pool: Callable[..., Pool], store: Store) -> None:
    pool, found = make_pool(), []
    for value in range(2):
        stage = Stage("modules", toy.say_modules, Number(value=value))
        pool.submit([job(stage)], store, Shape(stage.resources, None))
        poll_until(pool, ends(1))
        found.append("wave" in store.manifest(stage.address)["metrics"]["modules"])
    assert found == [False, True]


def test_a_worker_that_died_while_it_was_idle_costs_nothing(make_pool: Callable[..., Pool], store: Store) -> None:
    pool = make_pool()
    first, second = number("first"), number("second", 2)
    pool.submit([job(first)], store, Shape(first.resources, None))
    poll_until(pool, ends(1))
    os.kill(pid_of(store, first), signal.SIGKILL)
    pool.submit([job(second)], store, Shape(second.resources, None))
    reports = poll_until(pool, ends(1))
    assert isinstance(reports[-1], Finished)
    assert len(store.manifest(second.address)["attempts"]) == 1


@pytest.mark.chaos
def test_a_hub_that_died_is_replaced_when_the_next_seat_is_given(make_pool: Callable[..., Pool], store: Store) -> None:
    pool, hubs = make_pool(), []
    for value in range(3):
        if value == 2:
            ray.kill(hubs[-1].actor)
            time.sleep(1.0)
        pool.submit([job(number(f"n-{value}", value))], store, Shape(Resources(), None))
        poll_until(pool, lambda reports: any(isinstance(report, Finished) for report in reports))
        assert pool._hub is not None
        hubs.append(pool._hub)
    assert hubs[0] is hubs[1]
    assert hubs[2] is not hubs[0]
    assert hubs[2].counts().made == 0


def test_a_worker_is_ended_when_it_was_idle_for_long(make_pool: Callable[..., Pool], store: Store) -> None:
    pool, stage = make_pool(keep_idle_s=0.5), number("a")
    pool.submit([job(stage)], store, Shape(stage.resources, None))
    poll_until(pool, ends(1))
    assert is_alive(pid_of(store, stage))
    poll_until(pool, lambda reports: not pool._workers)
    wait_until_gone(pid_of(store, stage))


def test_idle_workers_make_room_for_a_placement_group(make_pool: Callable[..., Pool], store: Store) -> None:
    pool, stage = make_pool(), number("a")
    pool.submit([job(stage)], store, Shape(stage.resources, None))
    poll_until(pool, ends(1))
    group = ray.util.placement_group([{"CPU": 2}])  # as Ray Train asks for its ranks
    poll_until(pool, lambda reports: not pool._workers)
    assert group.wait(timeout_seconds=60)
    ray.util.remove_placement_group(group)


# Cohorts


def test_members_are_told_of_and_committed_as_they_leave(launcher: RayLauncher, store: Store) -> None:
    plan = cohort([9, 3, 6], unlucky=[2], placement=Pace(sleep_s=0.1))
    ended: list[tuple[str, list[str]]] = []

    def note(event: Event) -> None:
        if isinstance(event, StageEnded):
            ended.append((event.stage.name, sorted(store.addresses())))

    outcome = execute(plan, store, launcher, on_event=note)
    assert ended == [("chain-1", ["chain-1"]), ("chain-0", ["chain-0", "chain-1"])]
    assert [failure.message for failure in outcome.failed] == ["ValueError: step 2 is unlucky"]
    places = [store.manifest(stage.address)["where"] for stage in plan[:2]]
    assert len({place["pid"] for place in places}) == 1
    assert places[0]["cohort"] == [stage.address for stage in plan]


@pytest.mark.chaos
def test_when_a_cohorts_worker_is_killed_those_that_had_not_left_go_on_from_their_checkpoints(
    launcher: RayLauncher, store: Store, tmp_path: Path
) -> None:
    plan = cohort([2, 40, 40], placement=Pace(sleep_s=0.05, journal=str(tmp_path / "journal")))
    killed: list[int] = []
    retried: list[tuple[str, Kind]] = []
    started: list[tuple[str, int | None]] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, StageProgress) and event.progress.step >= 10 and not killed:
            killed.append(event.progress.pid)
            os.kill(event.progress.pid, signal.SIGKILL)
        if isinstance(event, StageRetried):
            retried.append((event.stage.name, event.kind))
        if isinstance(event, StageStarted) and killed:
            started.append((event.stage.name, event.from_step))

    outcome = execute(plan, store, launcher, on_event=kill_once)
    states = {done.stage.name: done.metrics["state"] for done in outcome.complete}
    assert states == {f"chain-{i}": expected_state(Chain(seed=i, steps=s)) for i, s in enumerate([2, 40, 40])}
    assert sorted(retried) == [("chain-1", Kind.LOST), ("chain-2", Kind.LOST)]
    assert sorted(name for name, _ in started) == ["chain-1", "chain-2"]
    assert all(step is not None and step >= 10 for _, step in started)
    assert len((tmp_path / "journal").read_text().splitlines()) <= 2 + 40 + 40 + 2
    assert len(store.manifest(plan[0].address)["attempts"]) == 1


def test_when_a_member_stalls_the_others_begin_again_at_no_cost(launcher: RayLauncher, store: Store) -> None:
    plan = [
        Stage(f"s-{i}", chain, Chain(seed=i, steps=2), together=toy.one_hangs, mates="m", cohort=2) for i in range(2)
    ]
    asked: list[tuple[Kind, int]] = []

    def decide(kind: Kind, history: object) -> Retry | GiveUp:
        asked.append((kind, len(list(history))))  # type: ignore[call-overload]  # a sequence of kinds
        return GiveUp("enough")

    events: list[Event] = []
    outcome = execute(plan, store, launcher, stall_timeout_s=1.5, decide=decide, on_event=events.append)
    assert [failure.kind for failure in outcome.failed] == [Kind.STALLED]
    assert asked == [(Kind.STALLED, 0)]
    (done,) = outcome.complete
    attempts = store.manifest(done.stage.address)["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["INTERRUPTED", "COMPLETE"]
    assert f"because {outcome.failed[0].stage.address} stalled" in attempts[0]["message"]
    told = [event for event in events if isinstance(event, StageInterrupted)]
    assert [(event.stage, event.message) for event in told] == [(done.stage, attempts[0]["message"])]


def test_what_began_in_a_cohort_whose_worker_was_ended_goes_on_before_what_waits(
    launcher: RayLauncher, store: Store
) -> None:
    both = [
        Stage(
            f"s-{i}", chain, Chain(seed=i, steps=2), together=toy.one_hangs, mates="m", cohort=2, resources=WHOLE,
            flops=1e9,
        )
        for i in range(2)
    ]  # fmt: skip
    others = [Stage(f"n-{i}", toy.add, Number(value=i), placement=Pace(), resources=WHOLE) for i in range(3)]
    order: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, StageStarted):
            order.append(event.stage.name)

    plan = [*both, *others]
    outcome = execute(plan, store, launcher, stall_timeout_s=1.5, decide=lambda kind, past: GiveUp(""), on_event=note)
    (failure,) = outcome.failed
    (mate,) = {stage.name for stage in both} - {failure.stage.name}
    assert order == ["s-0", "s-1", mate, "n-0", "n-1", "n-2"]


@pytest.mark.chaos
def test_a_stage_that_was_lost_goes_on_before_those_that_wait(
    launcher: RayLauncher, store: Store, tmp_path: Path
) -> None:
    plan = [
        Stage(
            f"chain-{i}",
            chain,
            Chain(seed=i, steps=40),
            placement=Pace(sleep_s=0.05, journal=str(tmp_path / str(i))),
            resources=WHOLE,
        )
        for i in range(3)
    ]
    order: list[str] = []

    def kill_the_first(event: Event) -> None:
        if isinstance(event, StageStarted):
            order.append(event.stage.name)
        if isinstance(event, StageProgress) and order == ["chain-0"]:
            os.kill(event.progress.pid, signal.SIGKILL)

    execute(plan, store, launcher, on_event=kill_the_first).raise_for_failures()
    # While the lost one waits for its next try, the worker that comes up takes the next.
    assert order in (["chain-0", "chain-0", "chain-1", "chain-2"], ["chain-0", "chain-1", "chain-0", "chain-2"])
