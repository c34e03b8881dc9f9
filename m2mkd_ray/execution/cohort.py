"""A cohort: several stages that one worker runs together, because they share most of what they read and compute.

Each member stays a stage of its own, with its own key, checkpoints, progress and
artifact: who shares a worker with whom is a matter of place, never of results. The
function that runs a cohort is a generator, so that a member's artifact is committed
when that member ends, and one that fails leaves the others at work.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m2mkd_ray.execution.stage import Metrics

if TYPE_CHECKING:
    from m2mkd_ray.execution.context import StageContext


class Withdrawn(Exception):
    """Raised by `StageContext.report` inside a stage that is not wanted any more: no failure, only an end."""


@dataclass(frozen=True)
class Member:
    """A stage as a cohort sees it."""

    config: Any
    context: "StageContext"


@dataclass(frozen=True)
class Left:
    """A member that has come to its end, or to grief."""

    place: int
    """Its place among the members, from 0."""
    metrics: Metrics | None = None
    """What the stage returns; its artifact is below its `context.out`."""
    error: Exception | None = None
    """Why it failed, if it did; the others go on."""


Together = Callable[[Sequence[Member]], Iterator[Left]]
"""Runs members together and tells of each once, as it ends. What it raises itself ends all that have not left."""


def alone(together: Together, config: Any, context: "StageContext") -> Metrics:
    """Run one stage as a cohort of its own: what a stage that can run together does when it does not.

    Raises:
        Exception: what the stage failed by.
    """
    (left,) = together([Member(config, context)])
    if left.error is not None:
        raise left.error
    assert left.metrics is not None
    return left.metrics
