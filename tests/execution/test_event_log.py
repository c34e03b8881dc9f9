"""The log of events: whole, in order, of several runs; a cut line costs itself alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from toy import Chain, Number, chain, number

from m2mkd_ray.execution import Event, LocalLauncher, Progress, Stage, StageProgress, Store, execute
from m2mkd_ray.execution.event_log import EventLog, read_events


def run(store: Store, plan: list[Stage]) -> list[Event]:
    heard: list[Event] = []
    with EventLog(store) as log:

        def tell(event: Event) -> None:
            heard.append(event)
            log(event)

        execute(plan, store, LocalLauncher(), on_event=tell)
    return heard


def test_every_event_of_every_run_is_there_in_order(any_store: Store) -> None:
    plan = [number("a", 1), replace(number("b", 2), run=_fail)]
    first, second = run(any_store, plan), run(any_store, plan)
    told = [event for event in first + second if not isinstance(event, StageProgress)]
    events = read_events(any_store)
    names = [event["event"] for event in events]
    assert [name for name in names if name.startswith("Stage")] == [type(event).__name__ for event in told]
    assert names.count("RunStarted") == names.count("RunEnded") == 2
    assert len({event["run"] for event in events}) == 2
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    (failed, _) = (event for event in events if event["event"] == "StageFailed")
    assert failed["kind"] == "RAISED"
    assert "no luck" in failed["message"]
    assert failed["stage"] == "b"
    of_a = read_events(any_store, {plan[0].address})
    assert {event["stage"] for event in of_a} == {"a"}
    assert of_a[-1]["event"] == "StageReused"


def _fail(config: Number, context: object) -> dict:
    raise ValueError("no luck")


def test_a_line_that_a_kill_cut_off_is_left_out(
    store: Store, folder_of: Callable[[Store], Path], caplog: pytest.LogCaptureFixture
) -> None:
    run(store, [number("a", 1)])
    whole = read_events(store)
    (file,) = (folder_of(store) / ".events").iterdir()
    file.write_text(file.read_text() + '{"time": "2026')
    assert read_events(store) == whole
    assert "cut off" in caplog.text


def test_a_log_that_cannot_be_written_ends_no_run(
    store: Store, folder_of: Callable[[Store], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(store).mkdir(parents=True)
    (folder_of(store) / ".events").write_text("in the way")
    run(store, [number("a", 1)])
    assert store.status(number("a", 1).address).state == "complete"
    assert caplog.text.count("The log of events") == 1


def test_progress_is_written_down_now_and_then(store: Store) -> None:
    """A chain reports at every step; its lines are ten seconds apart, so one is there at most."""
    stage = Stage("chain", chain, Chain(steps=30))
    with EventLog(store) as log:
        for step in range(5):
            log(StageProgress(stage, Progress(step, 30, {"loss": 1.0}, 0.0, 1, "host")))
    (line,) = (event for event in read_events(store) if event["event"] == "StageProgress")
    assert line["progress"]["step"] == 0
