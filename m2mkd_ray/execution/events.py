"""What the executor tells while it runs, and what it leaves at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from m2mkd_ray.errors import M2mkdError, RunError
from m2mkd_ray.execution.failures import Kind
from m2mkd_ray.execution.job import Where
from m2mkd_ray.execution.stage import Metrics, Stage
from m2mkd_ray.execution.store import Progress


@dataclass(frozen=True)
class StageReused:
    """The artifact was complete; nothing was run."""

    stage: Stage
    seconds: float
    """How long it took when it was made."""
    metrics: Metrics


@dataclass(frozen=True)
class StageStarted:
    """A worker took the stage up."""

    stage: Stage
    """With the resources and placement that its seat gives it."""
    where: Where
    from_step: int | None
    """The step of its checkpoint, with which it goes on; None: it begins at the beginning."""


@dataclass(frozen=True)
class StageProgress:
    """The worker reported how far it is."""

    stage: Stage
    progress: Progress


@dataclass(frozen=True)
class StageEnded:
    """The artifact is complete."""

    stage: Stage
    seconds: float
    metrics: Metrics
    where: Where


@dataclass(frozen=True)
class StageRetried:
    """An attempt failed, and there will be another."""

    stage: Stage
    kind: Kind
    attempt: int
    """Number of the attempt that failed, from 1."""
    delay_s: float
    message: str
    lost_steps: int = 0
    """Steps of the attempt that no checkpoint holds: they are done again."""


@dataclass(frozen=True)
class StageInterrupted:
    """Its worker was ended because of another stage; it gets another worker, and nothing counts against it."""

    stage: Stage
    message: str
    lost_steps: int = 0


@dataclass(frozen=True)
class StageWaits:
    """No node that is there can hold the stage; it waits for one."""

    stage: Stage
    reason: str
    """Which resource is missing."""
    since: float
    """In seconds since 1970."""


@dataclass(frozen=True)
class StageFailed:
    """The stage failed for good."""

    stage: Stage
    kind: Kind
    reason: str
    """Why it is not tried again, and what to do."""
    message: str
    """What went wrong."""
    traceback: str
    error: M2mkdError | None
    lost_steps: int = 0
    """Of its last attempt."""


@dataclass(frozen=True)
class StageSkipped:
    """The stage was not run, because what it needs failed."""

    stage: Stage
    because: tuple[Stage, ...]
    """The failed stages above it."""


@dataclass(frozen=True)
class StageWithdrawn:
    """The stage is not wanted any more: it was not run, or left its worker."""

    stage: Stage
    step: int | None
    """Of its newest checkpoint, from which it goes on if it is added again; None: there is none."""
    lost_steps: int = 0


Event = (
    StageReused
    | StageStarted
    | StageProgress
    | StageEnded
    | StageRetried
    | StageInterrupted
    | StageWaits
    | StageFailed
    | StageSkipped
    | StageWithdrawn
)


def each(*callbacks: Callable[[Event], None]) -> Callable[[Event], None]:
    """A callback that passes every event on to all of these, in order."""

    def tell(event: Event) -> None:
        for callback in callbacks:
            callback(event)

    return tell


@dataclass(frozen=True)
class Outcome:
    """How a run ended; every stage is in one of the four, in the order of the plan."""

    complete: tuple[StageReused | StageEnded, ...]
    failed: tuple[StageFailed, ...]
    skipped: tuple[StageSkipped, ...]
    withdrawn: tuple[StageWithdrawn, ...] = ()

    @property
    def metrics(self) -> Mapping[str, Metrics]:
        """What each complete stage returned, by address."""
        return {done.stage.address: done.metrics for done in self.complete}

    def raise_for_failures(self) -> None:
        """Do nothing if all is complete.

        Raises:
            RunError: stages failed; says which and why, what was not run and what is kept.
        """
        if not self.failed:
            return
        reused = sum(isinstance(done, StageReused) for done in self.complete)
        total = len(self.complete) + len(self.failed) + len(self.skipped)
        lines = [f"{len(self.failed)} of {total} stages failed:"]
        for failure in self.failed:
            lines += [f"- {failure.stage.address}: {failure.message}", f"  ({failure.reason})"]
        for skipped in self.skipped:
            lines.append(f"- {skipped.stage.address} was not run: it needs {_names(skipped.because)}")
        lines.append(
            f"{len(self.complete)} are complete ({reused} of them from before) and kept. "
            f"Run the same command again when the cause is gone: only the rest will run."
        )
        raise RunError("\n".join(lines)) from self.failed[0].error


def _names(stages: tuple[Stage, ...]) -> str:
    return ", ".join(stage.name for stage in stages)
