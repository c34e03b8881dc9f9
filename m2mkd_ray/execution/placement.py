"""Where ready stages run, and in which order: decided here, carried out by the executor.

A *seat* is a worker to come: the stages that it runs, what it is given, and the node
that it has to be on, if any. Nobody here starts anything, and nothing here changes a
result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.stage import Resources, Stage

GATHER_S = 60.0
"""A stage that was left out is asked about again when it has been ready for so long, whatever happened: it may be
that it waits for mates, and these do not come."""


@dataclass(frozen=True)
class Seat:
    """Stages that one worker runs, and where."""

    stages: tuple[Stage, ...]
    """More than one: a cohort. Their resources and placement are those that they run with (see `Stage.spread`)."""
    resources: Resources
    """Of the worker."""
    node: str | None = None
    """Id of the node that it has to be on; None: any."""


@dataclass(frozen=True)
class Occupied:
    """A seat whose worker is at work."""

    seat: Seat
    node: str | None
    """Id of the node that it is on; None: it waits for one."""
    since_s: float
    """Seconds since it began."""


@dataclass(frozen=True)
class View:
    """What the executor knows when it asks for seats."""

    nodes: Sequence[Node] = ()
    """Nodes that are there now."""
    occupied: Sequence[Occupied] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What stages took before, or are expected to take, by name."""
    coming: Sequence[Stage] = ()
    """Stages that are not ready, but will be when what workers have begun has ended, or a delay is over."""
    ready_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds for which stages have been ready, by address; empty where nothing idles while they wait."""


class Placer(Protocol):
    """Decides about seats."""

    replans: bool
    """Whether seats that no worker has taken yet are to be asked for anew when nodes have come or gone."""

    def seats(self, ready: Sequence[Stage], view: View) -> list[Seat]:
        """Seats for ready stages, in the order in which they should be taken. Stages that are left out wait, and
        are asked about again whenever something has changed."""

    def lacks(self, stage: Stage, view: View) -> str | None:
        """What a stage asks for and what there is, as `feasibility.lack` says it, where it can get no seat on these
        nodes however free they are; None: it can."""
