"""The events of a store on the terminal, and why stages wait."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_ray.cli import main
from m2mkd_ray.commands.watching import queue
from m2mkd_ray.execution import Kind, Stage, StageRetried, StageStarted, Store, plan_status
from m2mkd_ray.execution.event_log import EventLog
from m2mkd_ray.pipeline import plan
from m2mkd_ray.recipes import find_recipe


@pytest.fixture
def pair() -> Stage:
    (pair,) = (stage for stage in plan(find_recipe("demo")) if stage.name == "pair-0" and stage.of == "demo")
    return pair


@pytest.fixture
def store(tmp_path: Path, pair: Stage) -> Store:
    """A store whose log tells of two runs, of a pair and of a stage of another recipe."""
    store = Store(str(tmp_path / "runs"))
    where = {"host": "node-7", "pid": 4, "node_id": "n", "actor_id": "a", "node_group": "incubate", "spot": True}
    for stage in (pair, replace(pair, name="elsewhere")):
        with EventLog(store) as log:
            log(StageStarted(stage, where, 40))
            log(StageRetried(stage, Kind.PREEMPTED, 1, 0.5, "its node is being drained"))
    return store


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main(list(arguments))
    return capsys.readouterr().out


def test_events_of_a_recipe_alone_are_printed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    header, started, retried = shown(capsys, "events", "demo", "--store", store.root).splitlines()
    assert header.split() == ["time", "event", "stage", "what", "run"]
    assert "Started" in started
    assert "on node-7:4 in incubate, from_step 40" in started
    assert "Retried" in retried
    assert "kind PREEMPTED" in retried
    assert "its node is being drained" in retried


def test_the_newest_events_are_printed_for_scripts(
    store: Store, pair: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    (event,) = json.loads(shown(capsys, "events", "demo", "--store", store.root, "--last", "1", "--json"))
    assert (event["event"], event["kind"], event["address"]) == ("StageRetried", "PREEMPTED", pair.address)


def test_stages_that_could_run_say_why_they_do_not(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "runs"))
    waits = queue(plan_status(plan(find_recipe("demo")), store))
    assert {(found.name, why) for found, why in waits} == {("data", "no driver runs its recipe now")}
