"""Stages that share a worker: each is committed, fails and is tried again for itself, and is what it is alone."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import toy
from doubles import Desk
from toy import Chain, Number, Pace, chain, cohort, expected_state

from m2mkd_ray.execution import (
    AsGiven,
    Event,
    GiveUp,
    Kind,
    Left,
    LocalLauncher,
    Member,
    Metrics,
    Occupied,
    Outcome,
    Resources,
    Retry,
    Seat,
    Stage,
    StageEnded,
    StageFailed,
    StageRetried,
    StageStarted,
    Store,
    View,
    decide,
    execute,
)
from m2mkd_ray.execution.job import here, job
from m2mkd_ray.execution.reports import Failed, Finished
from m2mkd_ray.execution.runs import Run
from m2mkd_ray.execution.seating import Seating
from m2mkd_ray.execution.worker import run_cohort


def states(outcome: Outcome) -> dict[str, str]:
    return {done.stage.name: done.metrics["state"] for done in outcome.complete}


def alone(steps: Sequence[int]) -> dict[str, str]:
    return {f"chain-{seed}": expected_state(Chain(seed=seed, steps=count)) for seed, count in enumerate(steps)}


def test_members_are_committed_as_they_leave_and_are_what_they_are_alone(any_store: Store) -> None:
    plan = cohort([6, 2, 4])
    together: list[list[str]] = []
    ended: list[tuple[str, list[str]]] = []

    def note(event: Event) -> None:
        if isinstance(event, StageStarted):
            together.append(event.where["cohort"])
        if isinstance(event, StageEnded):
            ended.append((event.stage.name, sorted(any_store.addresses())))

    outcome = execute(plan, any_store, LocalLauncher(), on_event=note)
    assert states(outcome) == alone([6, 2, 4])
    assert together == [[mate.address for mate in plan]] * 3
    assert ended == [
        ("chain-1", ["chain-1"]),
        ("chain-2", ["chain-1", "chain-2"]),
        ("chain-0", ["chain-0", "chain-1", "chain-2"]),
    ]
    for stage in plan:
        (attempt,) = any_store.manifest(stage.address)["attempts"]
        assert attempt["where"]["cohort"] == [mate.address for mate in plan]
        assert any_store.manifest(stage.address)["progress"]["step"] == stage.config.model_dump()["steps"]
    assert any_store.unfinished() == []


def test_a_member_that_raises_leaves_the_others_at_work(store: Store) -> None:
    outcome = execute(cohort([6, 6, 6], unlucky=[1]), store, LocalLauncher())
    (failure,) = outcome.failed
    assert (failure.stage.name, failure.kind, failure.message) == (
        "chain-1",
        Kind.RAISED,
        "ValueError: step 2 is unlucky",
    )
    assert "in link" in failure.traceback
    assert set(states(outcome)) == {"chain-0", "chain-2"}
    assert store.checkpoints(failure.stage.address).newest_step() == 2
    assert [name for name in store.folders.names(f".partial/{failure.stage.address}") if "out-" in name] == []


def test_what_breaks_the_whole_cohort_ends_those_that_are_inside(store: Store) -> None:
    outcome = execute(cohort([3, 3, 3], toy.chains_that_break), store, LocalLauncher())
    assert list(states(outcome)) == ["chain-0"]
    assert [failure.message for failure in outcome.failed] == ["RuntimeError: the shared loader broke"] * 2


def test_a_member_that_is_never_told_of_has_failed(store: Store) -> None:
    outcome = execute(cohort([3, 3], toy.chains_that_forget), store, LocalLauncher())
    (failure,) = outcome.failed
    assert "ended without a word about this member" in failure.message


def leave_twice(members: Sequence[Member]) -> list[Left]:
    return [Left(0, chain(members[0].config, members[0].context)), Left(0, {}), Left(1, {})]


def leave_with_nothing(members: Sequence[Member]) -> list[Left]:
    return [Left(0), Left(1, {"state": float("nan")})]


@pytest.mark.parametrize(
    ("together", "complete", "messages"),
    [
        (leave_twice, ["chain-0"], ["told twice of place 0"]),
        (leave_with_nothing, [], ["neither metrics nor an error", "not finite: metrics.state is nan"]),
    ],
)
def test_a_cohort_that_breaks_its_contract_says_so(
    store: Store,
    together: Callable[[Sequence[Member]], list[Left]],
    complete: list[str],
    messages: list[str],
) -> None:
    plan = cohort([3, 3], lambda members: iter(together(members)))
    outcome = execute(plan, store, LocalLauncher())
    assert [done.stage.name for done in outcome.complete] == complete
    assert [message in failure.message for message, failure in zip(messages, outcome.failed)] == [True] * len(messages)


def test_members_go_on_from_checkpoints_of_their_own(store: Store) -> None:
    plan = cohort([6, 6], unlucky=[1])
    execute(plan, store, LocalLauncher())
    mended = [Stage(stage.name, lucky, stage.config, together=lucky_chains, mates="m", cohort=2) for stage in plan]
    started: dict[str, int | None] = {}

    def note(event: Event) -> None:
        if isinstance(event, StageStarted):
            started[event.stage.name] = event.from_step

    outcome = execute(mended, store, LocalLauncher(), on_event=note)
    assert states(outcome) == alone([6, 6])
    assert started == {"chain-1": 2}


def lucky(config: Chain, context: object) -> Metrics:
    """A chain whose defect was mended."""
    return chain(config.model_copy(update={"unlucky_at": None}), context)  # type: ignore[arg-type]  # a context


def lucky_chains(members: Sequence[Member]) -> list[Left]:
    return [Left(place, lucky(member.config, member.context)) for place, member in enumerate(members)]


def test_members_that_are_complete_take_no_part(store: Store) -> None:
    jobs = [job(stage) for stage in cohort([2, 3, 4])]
    list(run_cohort(jobs[1:2], store, here()))
    before = store.manifest(jobs[1].address)
    ends = list(run_cohort(jobs, store, here()))
    assert [end.address for end in ends] == [jobs[1].address, jobs[0].address, jobs[2].address]
    assert all(isinstance(end, Finished) for end in ends)
    assert store.manifest(jobs[1].address) == before
    assert store.manifest(jobs[0].address)["where"]["cohort"] == [jobs[0].address, jobs[2].address]


def test_a_member_whose_need_is_missing_fails_alone(store: Store) -> None:
    plan = cohort([2, 3])
    lacking = Stage("lacking", chain, Chain(steps=2), {"a": toy.number("need")}, together=toy.chains, mates="chains")
    ends = {end.address: end for end in run_cohort([job(stage) for stage in [lacking, *plan]], store, here())}
    failure = ends.pop(lacking.address)
    assert isinstance(failure, Failed)
    assert "is not complete in the store" in failure.message
    assert all(isinstance(end, Finished) for end in ends.values())


def test_stages_that_cannot_run_together_say_so(store: Store) -> None:
    jobs = [job(toy.number("a")), job(toy.number("b"))]
    assert ["has no `together`" in end.message for end in run_cohort(jobs, store, here()) if isinstance(end, Failed)]


def test_one_that_a_cohort_left_without_memory_is_tried_once_more_alone(store: Store) -> None:
    plan = cohort([3, 3, 3], toy.chains_with_little_memory)
    retried: list[StageRetried] = []
    outcome = execute(
        plan,
        store,
        LocalLauncher(),
        decide=lambda kind, history: Retry(0.0) if isinstance(decide(kind, history), Retry) else GiveUp("no"),
        on_event=lambda event: retried.append(event) if isinstance(event, StageRetried) else None,
    )
    assert states(outcome) == alone([3, 3, 3])
    assert [(event.stage.name, event.kind) for event in retried] == [("chain-2", Kind.CROWDED)]
    attempts = store.manifest(plan[2].address)["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["CROWDED", "COMPLETE"]
    assert ["cohort" in attempt["where"] for attempt in attempts] == [True, False]


def test_one_that_has_no_memory_alone_either_has_failed(store: Store) -> None:
    plan = [
        Stage(f"big-{i}", toy.run_out_of_memory, Number(value=i), together=all_out_of_memory, mates="big", cohort=2)
        for i in range(2)
    ]
    events: list[Event] = []
    outcome = execute(plan, store, LocalLauncher(), on_event=events.append)
    assert [failure.kind for failure in outcome.failed] == [Kind.OUT_OF_MEMORY] * 2
    assert [type(event) for event in events if isinstance(event, StageRetried | StageFailed)] == [
        StageRetried,
        StageRetried,
        StageFailed,
        StageFailed,
    ]


def all_out_of_memory(members: Sequence[Member]) -> list[Left]:
    raise MemoryError


# Seats as given


def test_a_cohort_has_as_many_members_as_it_may() -> None:
    plan = [*cohort([1, 1, 1, 1, 1], size=2), toy.number("other")]
    seats = AsGiven().seats(plan, View())
    assert [[stage.name for stage in seat.stages] for seat in seats] == [
        ["chain-0", "chain-1"],
        ["chain-2", "chain-3"],
        ["chain-4"],
        ["other"],
    ]


def test_a_cohort_with_room_waits_for_mates_that_are_coming() -> None:
    one, two, three = cohort([1, 1, 1], size=2)
    other = toy.number("other")
    assert AsGiven().seats([one], View(coming=[two])) == []
    assert [seat.stages for seat in AsGiven().seats([one, two], View(coming=[three]))] == [(one, two)]
    assert [seat.stages for seat in AsGiven().seats([one, other], View(coming=[other]))] == [(one,), (other,)]
    for seconds, seats in ((59.0, []), (61.0, [(one,)])):
        view = View(coming=[two], ready_s={one.address: seconds})
        assert [seat.stages for seat in AsGiven().seats([one], view)] == seats


def late_mate() -> tuple[dict[str, Run], Run, Run, Run]:
    """All runs; a chain that is ready, one that is not, and what that one needs."""
    one, two = cohort([1, 1])
    need = toy.number("need")
    plan = [need, one, replace(two, needs={"a": need})]
    runs = {stage.address: Run(stage) for stage in plan}
    return runs, *(runs[stage.address] for stage in (plan[1], plan[2], need))


def waiting_for_a_mate(store: Store) -> tuple[Desk, Seating, Run, Run]:
    """A chain that waits for its mate, whose need has begun: the seats given, who gives them, the chain, the need."""
    runs, ready, _, need = late_mate()
    desk = Desk()
    seating = Seating(runs, store, desk, AsGiven())
    seating.fill([need])
    seating.take_up(need, here())
    seating.fill([ready])
    assert desk.given == [["need"]]
    return desk, seating, ready, need


def test_only_mates_whose_needs_have_begun_are_waited_for(store: Store) -> None:
    desk, seating, ready, need = waiting_for_a_mate(store)
    need.started = None  # it waits for a worker, perhaps for ever
    seating.change()
    seating.fill([ready])
    assert desk.given == [["need"], ["chain-0"]]


def test_one_that_goes_alone_from_now_on_is_not_waited_for(store: Store) -> None:
    runs, ready, late, _ = late_mate()
    late.is_loner = True
    desk = Desk()
    runs = {run.stage.address: run for run in (ready, late)}
    late.stage = replace(late.stage, needs={})  # it waits for its next try
    Seating(runs, store, desk, AsGiven()).fill([ready])
    assert desk.given == [["chain-0"]]


def test_mates_are_waited_for_no_longer_than_a_minute(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.seating.GATHER_S", 0.2)
    monkeypatch.setattr("m2mkd_ray.execution.given.GATHER_S", 0.2)
    desk, seating, ready, _ = waiting_for_a_mate(store)
    time.sleep(0.25)
    seating.fill([ready])  # nothing has changed but the time
    assert desk.given == [["need"], ["chain-0"]]


def test_only_mates_that_ask_for_the_same_sit_together() -> None:
    one, two = cohort([1, 1])
    for other in (
        Stage("other", chain, two.config, together=toy.chains, mates="others", cohort=9),
        Stage("other", chain, two.config, together=lucky_chains, mates="chains", cohort=9),
        Stage("other", chain, two.config, together=toy.chains, mates="chains", cohort=1),
        Stage("other", chain, two.config, resources=Resources(cpus=2), together=toy.chains, mates="chains", cohort=9),
        Stage("other", chain, two.config, mates="chains", cohort=9),
    ):
        assert len(AsGiven().seats([one, other], View())) == 2


def test_what_takes_longest_comes_first_by_seconds_or_else_by_operations() -> None:
    def stage(name: str, flops: float = 0.0) -> Stage:
        return Stage(name, toy.add, Number(), flops=flops)

    def order(seconds: dict[str, float], *stages: Stage) -> list[str]:
        return [seat.stages[0].name for seat in AsGiven().seats(stages, View(seconds=seconds))]

    assert order({}, stage("a"), stage("b", 1e9), stage("c", 2e9)) == ["c", "b", "a"]
    # a runs at 1e9 operations a second, so c needs 3 s and comes between b and a.
    assert order({"a": 1.0, "b": 5.0}, stage("a", 1e9), stage("b"), stage("c", 3e9)) == ["b", "c", "a"]
    assert order({"a": 1.0}, stage("b", 1e9), stage("c", 3e9), stage("a")) == ["a", "c", "b"]


# Seats by others


class TwoAtATime:
    """Seats two stages at most, and remembers what it was shown."""

    replans = False

    def __init__(self) -> None:
        self.shown: list[tuple[list[str], Sequence[Occupied]]] = []

    def seats(self, ready: Sequence[Stage], view: View) -> list[Seat]:
        self.shown.append(([stage.name for stage in ready], view.occupied))
        free = 2 - sum(len(occupied.seat.stages) for occupied in view.occupied)
        return [Seat((stage,), stage.resources) for stage in ready[:free]]

    def lacks(self, stage: Stage, view: View) -> str | None:
        return AsGiven().lacks(stage, view)


def test_what_a_placer_leaves_out_waits_until_something_has_changed(store: Store) -> None:
    placer = TwoAtATime()
    plan = [toy.number(f"n-{i}", i, Pace()) for i in range(5)]
    outcome = execute(plan, store, LocalLauncher(), place=placer)
    assert len(outcome.complete) == 5
    shown = [(names, sorted(one.seat.stages[0].name for one in occupied)) for names, occupied in placer.shown]
    assert shown[0] == (["n-0", "n-1", "n-2", "n-3", "n-4"], [])
    assert (["n-2", "n-3", "n-4"], ["n-1"]) in shown
    assert max(len(occupied) for _, occupied in placer.shown) == 2
    assert len(shown) <= 1 + 2 * 5  # when a stage has started or ended, not with every poll
