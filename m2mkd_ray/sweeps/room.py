"""How many trials a cluster has room for: as many as fill the seats of its workers, and those that wait for them."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from m2mkd_ray.execution.feasibility import Node, in_ray, is_in_group
from m2mkd_ray.execution.stage import Resources, Stage

_MOST_TRIALS = 128
"""At the same time: each has a process, though an idle one."""


class Room(NamedTuple):
    """How many trials a cluster holds."""

    fills: int
    """So many fill its workers: they are gathered in cohorts, and those after them wait for a seat."""
    concurrent: int
    """So many are under way, with those that wait."""


def max_concurrent(stages: Sequence[Stage], nodes: Sequence[Node]) -> int:
    """How many trials fill the cluster: as many as their stages have seats.

    Stages of several seeds are no mates and take turns on few workers: then so many as fill a cohort of each.

    Args:
        stages: those of one trial that are its own.
    """
    kinds = Counter(_kind(stage) for stage in stages)
    of_resources = Counter(resources for resources, _, _ in kinds)
    fits = [
        math.ceil(cohort * max(workers / of_resources[resources], min(workers, 1)) / number)
        for (resources, cohort, _), number in kinds.items()
        for workers in (_workers(resources, nodes),)
    ]
    return max(1, min([*fits, _MOST_TRIALS]))


def of_a_worker(stages: Sequence[Stage]) -> int:
    """How many trials fill a worker that becomes free. So many are to wait for it, or it would be left to fewer.

    A worker becomes free all at once, when the last member of its cohort ends; seats that are free before make the
    others faster (docs/design.md). With a whole cohort waiting, the next one is full, and begins at once.

    Args:
        stages: those of one trial that are its own.
    """
    kinds = Counter(_kind(stage) for stage in stages)
    return max((math.ceil(cohort / number) for (_, cohort, _), number in kinds.items()), default=0)


def _kind(stage: Stage) -> tuple[Resources, int, str]:
    """Equal for stages that may be in one worker: what it holds, its seats, and who are mates."""
    has_mates = stage.together is not None and stage.mates
    return (stage.resources, stage.cohort, stage.mates) if has_mates else (stage.resources, 1, "")


def _workers(resources: Resources, nodes: Sequence[Node]) -> int:
    wanted = in_ray(resources)
    if not wanted:
        return _MOST_TRIALS
    return sum(
        math.floor(min(node.resources.get(name, 0.0) / amount for name, amount in wanted.items()) + 1e-6)
        for node in nodes
        if is_in_group(node, resources)
    )
