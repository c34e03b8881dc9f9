"""How far a plan is, from what the store holds: needs no driver and no cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from m2mkd_ray.execution.locks import Owner, owner_of
from m2mkd_ray.execution.stage import Metrics, Stage, in_order
from m2mkd_ray.execution.store import Progress, Status, Store

StageState = Literal["complete", "running", "partial", "absent", "blocked", "spoilt"]


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is."""

    name: str
    of: str
    address: str
    state: StageState
    """running: a living driver has it. partial: the next run goes on with it. absent: the next run begins it.
    blocked: absent, and so is something that it needs. spoilt: the next run makes it anew."""
    step: int | None
    total_steps: int | None
    seconds: float | None
    """How long it took; None if it is not complete."""
    metrics: Metrics
    """What it returned, or last reported."""
    where: Mapping[str, Any]
    """Where it ran or runs; empty if it never did."""
    attempts: Sequence[Mapping[str, Any]]
    """Every try: started, ended, outcome, message, where."""
    placement: Mapping[str, Any]
    """With what it ran; empty if it is not complete."""
    owner: Owner | None
    """The driver that computes it."""
    waits: str
    """Which resource it waits for, as no node can hold it; empty if it does not."""


def plan_status(plan: Sequence[Stage], store: Store) -> list[StageStatus]:
    """How far each stage of a plan is, and those that they need, in order."""
    found: dict[str, StageStatus] = {}
    for stage in in_order(plan):
        is_blocked = any(found[need.address].state != "complete" for need in stage.reads.values())
        found[stage.address] = _of_stage(stage, store, is_blocked)
    return list(found.values())


def _of_stage(stage: Stage, store: Store, is_blocked: bool) -> StageStatus:
    status = store.status(stage.address)
    manifest = status.manifest or {}
    last = manifest.get("progress")
    progress = status.progress if last is None else Progress(**last)
    owner = None if status.state == "complete" else owner_of(store, stage.address)
    attempts = manifest.get("attempts") or store.attempts(stage.address)
    return StageStatus(
        name=stage.name,
        of=stage.of,
        address=stage.address,
        state=_state(status, is_running=owner is not None and _is_open(attempts), is_blocked=is_blocked),
        step=progress.step if progress else None,
        total_steps=progress.total_steps if progress else None,
        seconds=manifest.get("seconds"),
        metrics=manifest.get("metrics") or (progress.metrics if progress else {}),
        where=attempts[-1]["where"] if attempts else {},
        attempts=attempts,
        placement=manifest.get("placement", {}),
        owner=owner,
        waits="" if owner is None else store.waits(stage.address),
    )


def _is_open(attempts: Sequence[Mapping[str, Any]]) -> bool:
    return bool(attempts) and attempts[-1]["ended"] is None


def _state(status: Status, is_running: bool, is_blocked: bool) -> StageState:
    if status.state in ("complete", "spoilt"):
        return status.state
    if is_running:
        return "running"
    return "blocked" if status.state == "absent" and is_blocked else status.state
