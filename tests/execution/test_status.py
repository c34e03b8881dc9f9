"""How far a plan is, as another process sees it in the store."""

from pathlib import Path

import toy
from toy import Number, diamond, number

from m2mkd_ray.execution import LocalLauncher, Metrics, Stage, StageContext, Store, execute, plan_status


def states(store: Store, plan: list[Stage]) -> dict[str, str]:
    return {status.name: status.state for status in plan_status(plan, store)}


def test_before_during_and_after(any_store: Store) -> None:
    def look(config: Number, context: StageContext) -> Metrics:
        context.report(3, 10, {"loss": 0.5})
        (status,) = [status for status in plan_status(plan, any_store) if status.name == "left"]
        seen.append(status)
        return toy.add(config, context)

    top, left, right, _ = diamond()
    left = Stage("left", look, left.config, left.needs)
    plan = [top, left, right, number("bottom", 3, a=left, b=right)]
    seen: list = []
    assert states(any_store, plan) == {"top": "absent", "left": "blocked", "right": "blocked", "bottom": "blocked"}
    execute(plan, any_store, LocalLauncher()).raise_for_failures()
    (during,) = seen
    assert (during.state, during.step, during.total_steps, during.metrics) == ("running", 3, 10, {"loss": 0.5})
    assert during.owner is not None
    assert set(states(any_store, plan).values()) == {"complete"}
    after = plan_status(plan, any_store)[1]
    assert (after.step, after.total_steps, after.metrics, after.owner) == (3, 10, {"total": 3}, None)
    assert after.seconds is not None
    assert after.where["pid"]


def test_failed_and_interrupted_work_is_partial_with_its_attempts(store: Store) -> None:
    def report_and_raise(config: Number, context: StageContext) -> Metrics:
        context.report(3, 10, {})
        raise ValueError("bad")

    stage = Stage("a", report_and_raise, Number())
    execute([stage], store, LocalLauncher())
    (status,) = plan_status([stage], store)
    assert (status.state, status.step) == ("partial", 3)
    assert [(a["outcome"], a["message"]) for a in status.attempts] == [("RAISED", "ValueError: bad")]


def test_a_spoilt_artifact_shows(store: Store) -> None:
    stage = number("a")
    execute([stage], store, LocalLauncher())
    (Path(store.root) / stage.address / "number").unlink()
    assert states(store, [stage, number("b", x=stage)]) == {"a": "spoilt", "b": "blocked"}
