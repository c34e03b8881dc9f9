"""Runs plans: stages, the store of their artifacts, and the executor over Ray or one process.

`RayLauncher` is in `ray_launcher`, which imports Ray.
"""

from m2mkd_ray.execution.checks import check
from m2mkd_ray.execution.cohort import Left, Member, Together, Withdrawn
from m2mkd_ray.execution.context import Checkpoints, StageContext
from m2mkd_ray.execution.events import (
    Event,
    Outcome,
    StageEnded,
    StageFailed,
    StageInterrupted,
    StageProgress,
    StageRetried,
    StageReused,
    StageSkipped,
    StageStarted,
    StageWaits,
    StageWithdrawn,
)
from m2mkd_ray.execution.executor import closure, execute
from m2mkd_ray.execution.failures import GiveUp, Kind, Retry, decide
from m2mkd_ray.execution.given import AsGiven, Gathering
from m2mkd_ray.execution.launcher import Launcher, LocalLauncher
from m2mkd_ray.execution.placement import Occupied, Placer, Seat, View
from m2mkd_ray.execution.requests import Requests
from m2mkd_ray.execution.stage import Metrics, NoPlacement, Resources, Stage, in_order
from m2mkd_ray.execution.status import StageStatus, plan_status
from m2mkd_ray.execution.store import Progress, Status, Store

__all__ = [
    "Stage", "Resources", "NoPlacement", "Metrics", "StageContext", "Checkpoints", "in_order",
    "Member", "Left", "Together", "Withdrawn", "Seat", "Occupied", "View", "Placer", "AsGiven", "Gathering",
    "Store", "Status", "Progress",
    "execute", "Requests", "closure", "check", "plan_status", "StageStatus",
    "Launcher", "LocalLauncher", "Kind", "Retry", "GiveUp", "decide",
    "Outcome", "Event", "StageReused", "StageStarted", "StageProgress", "StageEnded", "StageRetried", "StageFailed",
    "StageInterrupted", "StageWaits", "StageSkipped", "StageWithdrawn",
]  # fmt: skip
