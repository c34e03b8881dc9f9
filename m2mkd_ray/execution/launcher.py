"""The seam between the executor and the machines that run stages.

A launcher is given jobs and tells, in the order in which it happens, which
started, finished or failed. It decides nothing: retries and order are the
executor's. `LocalLauncher` is here; `RayLauncher` has a file of its own, so that
whoever needs no cluster does not wait for the import of Ray.
"""

import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from m2mkd_ray.errors import M2mkdError
from m2mkd_ray.execution.failures import Kind
from m2mkd_ray.execution.stage import Metrics, Stage
from m2mkd_ray.execution.store import Store
from m2mkd_ray.execution.worker import Job, Where, here, run_job


@dataclass(frozen=True)
class Started:
    """A worker took a job up."""

    address: str
    where: Where


@dataclass(frozen=True)
class Finished:
    """A job's artifact is complete."""

    address: str
    metrics: Metrics


@dataclass(frozen=True)
class Failed:
    """A job did not come to its end."""

    address: str
    kind: Kind
    message: str
    traceback: str = ""
    """Where it was raised, as Python prints it; empty if nothing was."""
    error: M2mkdError | None = None
    """The exception itself if it is one of ours; others need not pickle."""


Report = Started | Finished | Failed


class Launcher(Protocol):
    """Runs jobs somewhere."""

    runs_in_process: bool
    """Whether `poll` runs stages itself, so that an interrupt has to go right through it."""

    def submit(self, job: Job, store: Store) -> None:
        """Have a job run as soon as there is room for it."""

    def poll(self, timeout_s: float) -> list[Report]:
        """What happened since the last call; waits up to `timeout_s` for something."""

    def kill(self, address: str) -> None:
        """End a job's worker at once, if it has one; nothing more is reported of it."""

    def problems(self, plan: Sequence[Stage], store: Store) -> list[str]:
        """Why the plan cannot run here, a sentence for each reason; empty if it can."""

    def close(self) -> None:
        """Give back what this launcher started."""


def raised(address: str, error: BaseException) -> Failed:
    """An exception of a stage as a report that can cross processes."""
    ours = isinstance(error, M2mkdError)
    return Failed(
        address=address,
        kind=Kind.OUT_OF_MEMORY if _is_out_of_memory(error) else Kind.RAISED,
        message=str(error) if ours else f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
        error=error if isinstance(error, M2mkdError) else None,
    )


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: torch.OutOfMemoryError (CUDA) is not worth importing torch; its CPU allocator raises RuntimeError.
    by_name = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return by_name or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


class LocalLauncher:
    """Runs stages one after another in this process, whatever they ask for: for laptops and tests."""

    runs_in_process = True

    def __init__(self) -> None:
        self._waiting: deque[tuple[Job, Store]] = deque()
        self._next: tuple[Job, Store] | None = None

    def submit(self, job: Job, store: Store) -> None:
        """See `Launcher`."""
        self._waiting.append((job, store))

    def poll(self, timeout_s: float) -> list[Report]:
        """Tells of a start, and with the next call runs that stage to its end."""
        if self._next is None:
            if not self._waiting:
                return []
            self._next = self._waiting.popleft()
            return [Started(self._next[0].address, here())]
        (job, store), self._next = self._next, None
        try:
            return [Finished(job.address, run_job(job, store, here()))]
        except (Exception, SystemExit) as error:
            return [raised(job.address, error)]

    def kill(self, address: str) -> None:
        """See `Launcher`."""
        self._waiting = deque(entry for entry in self._waiting if entry[0].address != address)
        if self._next is not None and self._next[0].address == address:
            self._next = None

    def problems(self, plan: Sequence[Stage], store: Store) -> list[str]:
        """See `Launcher`."""
        return []

    def close(self) -> None:
        """See `Launcher`."""
        self._waiting.clear()
        self._next = None
