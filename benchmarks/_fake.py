"""Stages that do nothing for an exact while: calibrated work for the scheduling benchmark."""

import time
from pathlib import Path

from pydantic import BaseModel

from m2mkd_ray.execution import Metrics, Stage, StageContext

OPERATIONS_PER_S = 1e9
"""By which a fake stage says beforehand how long it takes."""


class Nap(BaseModel, frozen=True, extra="forbid"):
    """How long a stage takes on a node of speed 1."""

    seed: int
    seconds: float


class Machine(BaseModel, frozen=True, extra="forbid"):
    """Where naps are taken."""

    checkpoint_every_s: float = 2.0
    speeds: dict[str, float] = {}
    """Of nodes by id; 1 where none is given."""


class Roll(BaseModel, frozen=True, extra="forbid"):
    """A worker that waits for others."""

    seed: int
    count: int


def nap(config: Nap, context: StageContext) -> Metrics:
    """Sleep for `seconds` divided by the node's speed, to the point, with checkpoints of how much was slept."""
    machine = context.placement
    assert isinstance(machine, Machine)
    speed = _speed(machine)
    latest = context.checkpoints.latest()
    slept = 0.0 if latest is None else float((latest[1] / "slept").read_text())
    # What is waited for are points on the clock, so that what checkpoints cost is no part of the nap.
    began = time.monotonic() - slept / speed
    while slept < config.seconds:
        slept = min(config.seconds, slept + machine.checkpoint_every_s * speed)
        time.sleep(max(0.0, began + slept / speed - time.monotonic()))
        if slept < config.seconds:
            files = context.checkpoints.scratch()
            (files / "slept").write_text(str(slept))
            context.checkpoints.save(round(slept * 1e3), files)
    return {"slept": slept}


def _speed(machine: Machine) -> float:
    if not machine.speeds:
        return 1.0
    import ray

    return machine.speeds[ray.get_runtime_context().get_node_id()]


def answer(config: Roll, context: StageContext) -> Metrics:
    """Wait until as many workers as `count` have answered."""
    roll = Path(context.durable).parent.parent / "roll"
    roll.mkdir(exist_ok=True)
    (roll / str(config.seed)).touch()
    while len(list(roll.iterdir())) < config.count:
        time.sleep(0.1)
    return {}


def naps(seconds: list[float], machine: Machine) -> list[Stage]:
    """A stage for each duration."""
    return [
        Stage(
            f"nap-{seed}",
            nap,
            Nap(seed=seed, seconds=length),
            placement=machine,
            flops=length * OPERATIONS_PER_S,
        )
        for seed, length in enumerate(seconds)
    ]


def roll_call(count: int) -> list[Stage]:
    """Stages that end when as many workers run as there are stages."""
    return [Stage(f"roll-{seed}", answer, Roll(seed=seed, count=count)) for seed in range(count)]
