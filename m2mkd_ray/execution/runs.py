"""What the executor knows of the stages of a run."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from m2mkd_ray.execution.events import Event
from m2mkd_ray.execution.failures import Kind
from m2mkd_ray.execution.job import Where
from m2mkd_ray.execution.placement import Seat
from m2mkd_ray.execution.stage import Stage
from m2mkd_ray.execution.store import Progress


class State(Enum):
    """Where a stage is on its way."""

    WAITING = auto()
    """For what it reads, for its next try, or for a seat."""
    RUNNING = auto()
    """It has a seat, and a worker perhaps."""
    COMPLETE = auto()
    FAILED = auto()
    SKIPPED = auto()
    WITHDRAWN = auto()
    """Nobody wants it any more."""


@dataclass(eq=False)
class Seated:
    """A seat that was submitted."""

    seat: Seat
    node: str | None = None
    """Id of the node that its worker is on; None until it has one."""
    since: float = 0.0
    """Monotonic time at which its worker took it up."""
    heard: float = 0.0
    """Monotonic time at which one of its stages last reported, or left after that; 0 before its first report."""


@dataclass(eq=False)
class Run:
    """What the executor knows of a stage."""

    stage: Stage
    state: State = State.WAITING
    history: list[Kind] = field(default_factory=list)
    not_before: float = 0.0
    seated: Seated | None = None
    """Its seat while it runs."""
    is_loner: bool = False
    """Whether a cohort was too much for it."""
    where: Where = field(default_factory=dict)
    started: float | None = None
    """Monotonic time at which a worker took it up; None while it waits for one."""
    progress: Progress | None = None
    """What it last said; before this attempt's first report, what an earlier one left."""
    changed: float | None = None
    """Monotonic time at which this attempt last said something; None before its first report."""
    lacks_since: float | None = None
    """Monotonic time since which no node can hold it; None if one can."""
    withdrawn_at: float | None = None
    """Monotonic time since which it is to leave its worker; None if it may stay."""
    lost_steps: int = 0
    """Steps that attempts lost, of which nobody has been told yet."""
    has_begun: bool = False
    """Whether a worker ever took it up in this run."""
    end: Event | None = None

    @property
    def offered(self) -> Stage:
        """The stage as it is offered a seat."""
        return replace(self.stage, together=None, mates="") if self.is_loner else self.stage

    @property
    def as_seated(self) -> Stage:
        """The stage as its seat has it; as it is offered one, where it has none."""
        seated = self.seated.seat.stages if self.seated is not None else ()
        return next((stage for stage in seated if stage.address == self.stage.address), self.offered)

    @property
    def silence_s(self) -> float:
        """Seconds since its last report; 0 where none is due: before this attempt's first, and after the last step."""
        return 0.0 if self.changed is None or self.is_after_last_step else time.monotonic() - self.changed

    @property
    def is_after_last_step(self) -> bool:
        """Whether it, or an attempt before it, has reported its last step."""
        return self.progress is not None and self.progress.step >= self.progress.total_steps

    @property
    def unheard_s(self) -> float:
        """Seconds since a worker took it up, as long as nobody in that worker has reported; 0 otherwise.

        A member of a cohort that goes on from a later checkpoint than its mates says nothing until they are there.
        """
        is_unheard = self.seated is not None and not self.seated.heard
        return time.monotonic() - self.started if self.started is not None and is_unheard else 0.0

    def kind_of(self, kind: Kind) -> Kind:
        """A failure as it is to be judged: memory that was too small for a cohort may do for one of its members."""
        is_crowded = self.seated is not None and len(self.seated.seat.stages) > 1
        return Kind.CROWDED if is_crowded and kind is Kind.OUT_OF_MEMORY else kind

    def sit(self, seated: Seated, progress: Progress | None) -> None:
        """It was submitted; `progress` is what an earlier attempt said last."""
        self.state, self.seated, self.started, self.changed, self.progress = (
            State.RUNNING,
            seated,
            None,
            None,
            progress,
        )

    def hear(self, progress: Progress) -> None:
        """It has reported."""
        self.progress, self.changed = progress, time.monotonic()
        if self.seated is not None:
            self.seated.heard = self.changed

    def leave(self) -> None:
        """It has left its worker: those that waited for it there may have to report from now on."""
        if self.seated is not None and self.seated.heard:
            self.seated.heard = time.monotonic()

    def take_lost_steps(self) -> int:
        """The steps that were lost; they are told once."""
        lost, self.lost_steps = self.lost_steps, 0
        return lost

    def want_again(self) -> None:
        """It had come to an end that was not its artifact, and is asked for anew."""
        self.end, self.withdrawn_at = None, None
        self.history.clear()
        self.wait()

    def wait(self, until: float = 0.0) -> None:
        """It goes back to those that wait, until a monotonic time at least."""
        self.state, self.seated, self.started, self.not_before = State.WAITING, None, None, until


def in_state(runs: Mapping[str, Run], state: State) -> list[Run]:
    """Those that are in a state, in the order of the runs."""
    return [run for run in runs.values() if run.state is state]
