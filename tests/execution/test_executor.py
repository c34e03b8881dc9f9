"""The executor brings a plan to its end: what is complete is reused, what fails stops only what is below it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy
from doubles import Worker
from toy import Chain, Number, Pace, chain, cohort, diamond, expected_state, number, slow_chain

from m2mkd_ray.errors import LockedError, RunError, StoreError, TrainingError, UsageError
from m2mkd_ray.execution import (
    Event,
    GiveUp,
    Kind,
    LocalLauncher,
    Metrics,
    Outcome,
    Progress,
    Stage,
    StageContext,
    StageEnded,
    StageFailed,
    StageReused,
    StageSkipped,
    StageStarted,
    Store,
    execute,
    plan_status,
)
from m2mkd_ray.execution.locks import Locks, owner_of

DRIVER = """
import sys
from pathlib import Path
from toy import number, slow_chain
from m2mkd_ray.execution import LocalLauncher, Store, execute
first = number("first")
last = slow_chain(Path(sys.argv[2]), sleep_s=0.1)
try:
    execute([first, last], Store(sys.argv[1]), LocalLauncher())
except KeyboardInterrupt:
    sys.exit(130)
"""


def run(store: Store, plan: list[Stage], **options: object) -> Outcome:
    return execute(plan, store, LocalLauncher(), **options)  # type: ignore[arg-type]  # options of any kind


def ran(outcome: Outcome) -> list[str]:
    return [done.stage.name for done in outcome.complete if isinstance(done, StageEnded)]


def reused(outcome: Outcome) -> list[str]:
    return [done.stage.name for done in outcome.complete if isinstance(done, StageReused)]


def test_a_plan_is_run_once_and_then_reused(any_store: Store) -> None:
    plan = diamond(value=4)
    first = run(any_store, plan)
    assert ran(first) == ["top", "left", "right", "bottom"]
    assert first.metrics[plan[-1].address] == {"total": 3 * 4 + 6}
    second = run(any_store, plan)
    assert reused(second) == ["top", "left", "right", "bottom"]
    assert second.metrics == first.metrics
    second.raise_for_failures()


def test_needs_that_the_plan_does_not_name_are_run_too(store: Store) -> None:
    assert ran(run(store, diamond()[-1:])) == ["top", "left", "right", "bottom"]


def test_a_change_runs_only_what_is_below_it(store: Store) -> None:
    top, _, right, _ = diamond()
    run(store, diamond())
    changed = number("left", 7, a=top)
    outcome = run(store, [top, changed, right, number("bottom", 3, a=changed, b=right)])
    assert ran(outcome) == ["left", "bottom"]
    assert reused(outcome) == ["top", "right"]


def test_other_resources_and_placement_run_nothing_again(store: Store) -> None:
    run(store, [number("a")])
    assert ran(run(store, [replace(number("a"), placement=Pace(sleep_s=9), of="another")])) == []


def test_until_runs_only_what_leads_there(store: Store) -> None:
    assert ran(run(store, diamond(), until=["left"])) == ["top", "left"]


def test_until_a_stage_that_is_not_there_lists_those_that_are(store: Store) -> None:
    with pytest.raises(UsageError, match=r"has no stage botom\. It has: bottom, left, right, top"):
        run(store, diamond(), until=["botom"])


def test_a_failure_leaves_siblings_alone_and_skips_what_is_below(store: Store) -> None:
    top, left, right, _ = diamond()
    bad = Stage("bad", toy.raise_value_error, Number(value=13), {"a": top})
    below = number("below", a=bad, b=left)
    plan = [top, bad, left, below, number("further", a=below), right]
    outcome = run(store, plan)
    assert ran(outcome) == ["top", "left", "right"]
    assert [failure.stage.name for failure in outcome.failed] == ["bad"]
    assert "the number 13 is unlucky" in outcome.failed[0].traceback
    assert [(skipped.stage.name, skipped.because) for skipped in outcome.skipped] == [
        ("below", (bad,)),
        ("further", (bad,)),
    ]
    with pytest.raises(RunError) as caught:
        outcome.raise_for_failures()
    message = str(caught.value)
    assert message.startswith("1 of 6 stages failed:")
    assert "ValueError: the number 13 is unlucky" in message
    assert f"{below.address} was not run: it needs bad" in message
    assert "3 are complete (0 of them from before) and kept" in message


def test_an_error_of_ours_comes_back_as_itself(store: Store) -> None:
    outcome = run(store, [Stage("bad", toy.raise_training_error, Number())])
    assert isinstance(outcome.failed[0].error, TrainingError)
    assert outcome.failed[0].message == "The loss is not finite at step 3. Lower the learning rate."
    with pytest.raises(RunError) as caught:
        outcome.raise_for_failures()
    assert caught.value.__cause__ is outcome.failed[0].error


def test_running_out_of_memory_says_what_to_lower(store: Store) -> None:
    (failure,) = run(store, [Stage("big", toy.run_out_of_memory, Number())]).failed
    assert failure.kind is Kind.OUT_OF_MEMORY
    assert "lower `micro_batch`" in failure.reason


def test_a_failed_stage_is_tried_again_by_the_next_run(store: Store) -> None:
    bad = Stage("bad", toy.raise_value_error, Number())
    run(store, [bad])
    assert run(store, [replace(bad, run=toy.add)]).complete  # the code was mended
    outcomes = [attempt["outcome"] for attempt in store.manifest(bad.address)["attempts"]]
    assert outcomes == ["RAISED", "COMPLETE"]


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_text("12345")])
def test_a_spoilt_artifact_is_found_at_the_start_and_made_anew(
    any_store: Store,
    folder_of: Callable[[Store], Path],
    spoil: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = diamond()
    run(any_store, plan)
    spoil(folder_of(any_store) / plan[1].address / "number")
    outcome = run(any_store, plan)
    assert (ran(outcome), reused(outcome)) == (["left"], ["top", "right", "bottom"])
    assert f"Artifact {plan[1].address} is spoilt (number " in caplog.text
    assert len(list((folder_of(any_store) / ".quarantine").iterdir())) == 1
    assert any_store.status(plan[1].address, verify=True).state == "complete"


def test_changed_contents_are_found_with_verify(any_store: Store, folder_of: Callable[[Store], Path]) -> None:
    plan = diamond()
    run(any_store, plan)
    (folder_of(any_store) / plan[0].address / "number").write_text("7")
    assert ran(run(any_store, plan)) == []
    assert ran(run(any_store, plan, verify=True)) == ["top"]


def test_changed_contents_are_found_by_who_reads_them_and_made_anew(
    any_store: Store, folder_of: Callable[[Store], Path], caplog: pytest.LogCaptureFixture
) -> None:
    plan = diamond()
    run(any_store, plan[:3])
    (folder_of(any_store) / plan[1].address / "number").write_text("7")
    (outcome, total) = (run(any_store, plan), 3 * 1 + 6)
    assert sorted(ran(outcome)) == ["bottom", "left"]
    assert outcome.metrics[plan[-1].address] == {"total": total}
    assert f"Artifact {plan[1].address} is spoilt (number has sha256" in caplog.text


@pytest.mark.parametrize("left", [b"", None], ids=["empty manifest", "no manifest"])
def test_a_folder_without_a_readable_manifest_is_put_aside_and_its_stage_goes_on(
    any_store: Store, folder_of: Callable[[Store], Path], tmp_path: Path, left: bytes | None
) -> None:
    stage = Stage("chain", chain, Chain(seed=3, steps=6), placement=Pace(journal=str(tmp_path / "journal")))
    file = folder_of(any_store) / stage.address / "manifest.json"
    file.parent.mkdir(parents=True)
    (file.parent / "state").write_text("half")
    if left is not None:
        file.write_bytes(left)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "state").write_text(expected_state(Chain(seed=3, steps=4)))
    any_store.checkpoints(stage.address).save(4, tmp_path / "files")
    run(any_store, [stage]).raise_for_failures()
    assert (tmp_path / "journal").read_text().split("\n")[:-1] == ["step 4", "step 5"]
    (moved,) = (folder_of(any_store) / ".quarantine").iterdir()
    assert (moved / "state").read_text() == "half"
    assert reused(run(any_store, [stage])) == ["chain"]


def test_a_missing_file_is_found_by_who_reads_it_and_made_anew(
    any_store: Store, folder_of: Callable[[Store], Path]
) -> None:
    plan = diamond()
    run(any_store, plan[:3])
    files = [folder_of(any_store) / plan[1].address / "number"]

    def lose_it(event: Event) -> None:
        if isinstance(event, StageStarted) and files:
            files.pop().unlink()

    assert sorted(ran(run(any_store, plan, on_event=lose_it))) == ["bottom", "left"]


def test_what_a_kill_in_a_commit_left_of_a_complete_stage_is_swept(any_store: Store) -> None:
    plan = diamond()
    run(any_store, plan)
    for stage in (plan[0], number("other")):
        any_store.say_attempts(stage.address, [])
    run(any_store, plan)
    assert any_store.folders.names(".partial") == [number("other").address]


def test_stages_that_took_longest_before_come_first(store: Store, tmp_path: Path) -> None:
    sleeps = {"short": 0.0, "long": 0.2, "middle": 0.1}
    order: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, StageStarted):
            order.append(event.stage.name)

    run(store, [number(name, 1, Pace(sleep_s=sleep_s)) for name, sleep_s in sleeps.items()])
    run(store, [number(name, 2) for name in sleeps], on_event=note)  # other results, so known only by name
    assert order == ["long", "middle", "short"]


def test_events_tell_the_story(store: Store) -> None:
    bad = Stage("bad", toy.raise_value_error, Number())
    events: list[Event] = []
    run(store, [number("a")])
    run(store, [number("a"), bad, number("b", x=bad)], on_event=events.append)
    assert [(type(event), event.stage.name) for event in events] == [
        (StageReused, "a"),
        (StageStarted, "bad"),
        (StageFailed, "bad"),
        (StageSkipped, "b"),
    ]


def test_a_driver_is_refused_while_another_has_a_stage(store: Store) -> None:
    plan = diamond()
    with Locks(store) as other:
        other.acquire([plan[1].address])
        with pytest.raises(LockedError, match=f"computing `{plan[1].address}`"):
            run(store, plan)
        assert owner_of(store, plan[0].address) is None  # nothing is left locked
        assert store.status(plan[0].address).state == "absent"
    assert len(ran(run(store, plan))) == 4


def test_what_is_complete_can_be_reused_while_another_driver_works_elsewhere(store: Store) -> None:
    plan = diamond()
    run(store, plan)
    with Locks(store) as other:
        other.acquire([plan[1].address])
        assert len(reused(run(store, plan))) == 4


def test_a_chain_is_the_same_with_and_without_an_interruption(any_store: Store, tmp_path: Path) -> None:
    config = Chain(seed=3, steps=6)
    stage = Stage("chain", chain, config)
    (tmp_path / "files").mkdir()
    half = expected_state(Chain(seed=3, steps=4))
    (tmp_path / "files" / "state").write_text(half)
    any_store.checkpoints(stage.address).save(4, tmp_path / "files")
    started: list[int | None] = []

    def note(event: Event) -> None:
        if isinstance(event, StageStarted):
            started.append(event.from_step)

    outcome = run(any_store, [stage], on_event=note)
    assert outcome.metrics[stage.address] == {"state": expected_state(config)}
    assert started == [4]


# Locks that are lost, stores that fail


def lose_the_lock(config: Number, context: StageContext) -> Metrics:
    """Another driver takes this stage over and begins, while this one is paused; then it is interrupted."""
    file = Path(context.durable).parents[2] / ".locks" / Path(context.durable).parent.name
    file.write_text(json.dumps({**json.loads(file.read_text()), "driver": "another"}))
    raise KeyboardInterrupt if config.value else ValueError


@pytest.mark.parametrize(("value", "error"), [(1, KeyboardInterrupt), (0, None)], ids=["interrupted", "raised"])
def test_a_driver_that_lost_its_lock_leaves_the_others_record_alone(
    store: Store, value: int, error: type[BaseException] | None
) -> None:
    stage = Stage("lost", lose_the_lock, Number(value=value))
    if error is None:
        run(store, [stage])
    else:
        with pytest.raises(error):
            run(store, [stage])
    assert [attempt["outcome"] for attempt in store.attempts(stage.address)] == [None]


class FullStore(Store):
    """Has no space left from some moment on."""

    def say_attempts(self, address: str, attempts: Sequence[Mapping[str, Any]]) -> None:
        if attempts[-1]["ended"] is not None:
            raise StoreError("no space is left")
        super().say_attempts(address, attempts)


def test_a_store_that_fails_too_does_not_hide_the_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def interrupt(config: Number, context: StageContext) -> Metrics:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(FullStore(str(tmp_path / "store")), [Stage("a", interrupt, Number())])
    assert "no space is left" in caplog.text


# Stages that say nothing


SILENCE = [None] * 20  # 0.2 s at least


@pytest.mark.parametrize(
    ("says", "is_killed"),
    [
        ([(1, 9), *SILENCE], True),
        (SILENCE, False),  # it waits for what it needs (the ranks of a fine-tuning), or never reports
        ([(9, 9), *SILENCE], False),  # it has no more steps to tell of
        ([(step, 99) for step in range(20)], False),
    ],
    ids=["silent after its first report", "never reports", "after its last step", "reports"],
)
def test_a_stage_that_falls_silent_is_killed(
    store: Store, monkeypatch: pytest.MonkeyPatch, says: list[tuple[int, int] | None], is_killed: bool
) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.executor._WATCH_LOCAL_S", 0.0)
    stage, worker = number("a"), Worker(says)
    store.say_progress(stage.address, Progress(5, 9, {}, 0.0, 1, "here"))  # of an attempt before
    outcome = execute([stage], store, worker, stall_timeout_s=0.1, decide=lambda kind, history: GiveUp(str(kind)))
    assert [failure.kind for failure in outcome.failed] == ([Kind.STALLED] if is_killed else [])
    assert worker.killed == ([stage.address] if is_killed else [])


@pytest.mark.parametrize(
    ("says", "is_killed"),
    [(SILENCE, True), ([(1, 9), *SILENCE], False)],
    ids=["never reports", "silent after its first report"],
)
def test_a_stage_that_never_reports_is_given_up_as_its_ranks_may_find_no_place(
    store: Store, monkeypatch: pytest.MonkeyPatch, says: list[tuple[int, int] | None], is_killed: bool
) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.executor._WATCH_LOCAL_S", 0.0)
    stage, worker = number("a"), Worker(says)
    outcome = execute([stage], store, worker, wait_timeout_s=0.1)
    assert [failure.kind for failure in outcome.failed] == ([Kind.UNPLACED] if is_killed else [])
    assert worker.killed == ([stage.address] if is_killed else [])
    for failure in outcome.failed:
        assert "said nothing for 0 s since it started: its ranks (Ray Train) may wait" in failure.message
        assert "--wait-timeout" in failure.reason


MATES_STEPS = [(step, 99, 1) for step in range(20)]  # the second member's; 0.2 s at least


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ([*MATES_STEPS, (6, 9, 0)], None),  # it waits until its mate is where it is
        ([*MATES_STEPS, "left 1", *SILENCE], Kind.STALLED),
        (SILENCE, Kind.UNPLACED),
    ],
    ids=["while its mate reports", "when its mate has left", "in a worker that says nothing"],
)
def test_a_member_that_is_ahead_of_its_cohort_may_be_silent(
    store: Store, monkeypatch: pytest.MonkeyPatch, says: list[tuple[int, ...] | str | None], kind: Kind | None
) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.executor._WATCH_LOCAL_S", 0.0)
    (ahead, mate), worker = cohort([9, 99]), Worker(says)
    store.say_progress(ahead.address, Progress(5, 9, {}, 0.0, 1, "here"))  # of an attempt before
    outcome = execute(
        [ahead, mate],
        store,
        worker,
        stall_timeout_s=0.1,
        wait_timeout_s=0.1,
        decide=lambda kind, history: GiveUp(str(kind)),
    )
    failed = {failure.stage.name: failure.kind for failure in outcome.failed}
    assert failed.get(ahead.name) == kind
    assert worker.killed[:1] == ([] if kind is None else [ahead.address])


def test_why_a_stage_waited_is_forgotten_by_the_driver_that_comes_after(store: Store) -> None:
    need = number("need")
    last = number("last", x=need)
    for stage in (need, last):
        store.say_waits(stage.address, "64 CPUs")  # and then its driver was killed
    waits: list[list[str]] = []

    def look(event: Event) -> None:
        if isinstance(event, StageStarted):
            waits.append([status.waits for status in plan_status([last], store)])

    run(store, [last], on_event=look)
    assert waits == [["", ""], ["", ""]]


# Drivers in processes of their own


def driver(store: Store, journal: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A driver that is in the middle of its second stage."""
    process = subprocess.Popen([sys.executable, "-c", DRIVER, store.root, str(journal)], env=environment)
    deadline = time.monotonic() + 30
    while not (journal.exists() and len(journal.read_text().splitlines()) >= 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def finish(store: Store, journal: Path) -> list[str]:
    """Run the rest here, and give the steps that were run in all."""
    last = slow_chain(journal, sleep_s=0.0)
    outcome = run(store, [number("first"), last])
    assert reused(outcome) == ["first"]
    assert outcome.metrics[last.address] == {"state": expected_state(Chain(steps=20))}
    return journal.read_text().splitlines()


def test_a_driver_that_was_killed_is_gone_on_with(store: Store, tmp_path: Path, environment: dict[str, str]) -> None:
    journal = tmp_path / "journal"
    process = driver(store, journal, environment)
    process.kill()
    process.wait()
    last = slow_chain(journal)
    assert store.status(last.address).state == "partial"
    steps = finish(store, journal)
    assert len(steps) <= 21  # at most the step that was cut off ran twice
    attempts = [attempt["outcome"] for attempt in store.manifest(last.address)["attempts"]]
    assert attempts == ["LOST", "COMPLETE"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_driver_releases_its_locks_and_is_gone_on_with(
    store: Store, tmp_path: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    journal = tmp_path / "journal"
    process = driver(store, journal, environment)
    os.kill(process.pid, number)
    assert process.wait(timeout=10) == 130
    assert store.folders.names(".locks") == []
    assert store.attempts(slow_chain(journal).address)[-1]["outcome"] == "INTERRUPTED"
    assert len(finish(store, journal)) <= 21
