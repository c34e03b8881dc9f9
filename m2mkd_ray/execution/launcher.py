"""The seam between the executor and the machines that run stages.

A launcher is given jobs and tells, in the order in which it happens, which
started, finished or failed. It decides nothing: retries and places are the
executor's. `LocalLauncher` is here; `RayLauncher` has a file of its own, so that
whoever needs no cluster does not wait for the import of Ray.
"""

from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.job import Job, here
from m2mkd_ray.execution.reports import End, Failed, Finished, Report, Started, raised
from m2mkd_ray.execution.stage import Resources, Stage
from m2mkd_ray.execution.store import Store
from m2mkd_ray.execution.worker import run_cohort

__all__ = ["Launcher", "LocalLauncher", "Report", "Started", "Finished", "Failed", "raised"]


class Launcher(Protocol):
    """Runs jobs somewhere."""

    runs_in_process: bool
    """Whether `poll` runs stages itself, so that an interrupt has to go right through it, and nothing waits for
    room."""

    def submit(
        self,
        jobs: Sequence[Job],
        store: Store,
        node: str | None = None,
        resources: Resources | None = None,
        *,
        goes_first: bool = False,
    ) -> None:
        """Have a job, or several as a cohort, run in one worker as soon as there is room for it.

        Args:
            node: id of the node that the worker has to be on; None: any.
            resources: of the worker; None: those of the first job.
            goes_first: before all that wait, instead of after them.
        """

    def poll(self, timeout_s: float) -> list[Report]:
        """What happened since the last call; waits up to `timeout_s` for something."""

    def kill(self, address: str) -> set[str]:
        """End a job's worker at once, if it has one; nothing more is reported of it, nor of those that end with it.

        Returns:
            The addresses of the other members of its cohort that had not left.
        """

    def recall(self, addresses: Collection[str]) -> set[str]:
        """Withdraw jobs that no worker has taken up yet, each with its cohort.

        Returns:
            The addresses that were withdrawn; nothing more is reported of them.
        """

    def nodes(self) -> list[Node]:
        """The nodes that are there now; empty where there is only this process."""

    def may_grow(self) -> bool:
        """Whether more nodes may come."""

    def most_nodes(self) -> list[Node]:
        """The nodes that there may be at once at most, as far as that is known; those that are there otherwise.

        Nodes that are still to come have no `id`.
        """

    def problems(self, plan: Sequence[Stage], store: Store) -> list[str]:
        """Why the plan cannot run here, a sentence for each reason; empty if it can."""

    def close(self) -> None:
        """Give back what this launcher started."""


@dataclass
class _Seated:
    """Jobs that are run together, and those of them that have not left."""

    jobs: Sequence[Job]
    store: Store
    inside: set[str] = field(init=False)
    ends: Generator[End, None, None] | None = None
    """None until it has started."""

    def __post_init__(self) -> None:
        self.inside = {job.address for job in self.jobs}


class LocalLauncher:
    """Runs stages one after another in this process, whatever they ask for: for laptops and tests.

    The members of a cohort run together; `poll` goes on until the next one leaves.
    """

    runs_in_process = True

    def __init__(self) -> None:
        self._waiting: deque[_Seated] = deque()
        self._now: _Seated | None = None

    def submit(
        self,
        jobs: Sequence[Job],
        store: Store,
        node: str | None = None,
        resources: Resources | None = None,
        *,
        goes_first: bool = False,
    ) -> None:
        """See `Launcher`."""
        if goes_first:
            self._waiting.appendleft(_Seated(jobs, store))
        else:
            self._waiting.append(_Seated(jobs, store))

    def poll(self, timeout_s: float) -> list[Report]:
        """Tells of a start; with each further call runs until one of those that started has come to its end."""
        if self._now is None:
            if not self._waiting:
                return []
            self._now = self._waiting.popleft()
            self._now.ends = run_cohort(self._now.jobs, self._now.store, here())
            addresses = [job.address for job in self._now.jobs]
            where = here() if len(addresses) == 1 else {**here(), "cohort": addresses}
            return [Started(address, where) for address in addresses]
        seated = self._now
        assert seated.ends is not None
        end = next(seated.ends)
        seated.inside.discard(end.address)
        if not seated.inside:
            self._leave()
        return [end]

    def kill(self, address: str) -> set[str]:
        """See `Launcher`."""
        if self._now is not None and address in self._now.inside:
            others = self._now.inside - {address}
            self._leave()
            return others
        return self.recall([address]) - {address}

    def recall(self, addresses: Collection[str]) -> set[str]:
        """See `Launcher`."""
        recalled = [seated for seated in self._waiting if not seated.inside.isdisjoint(addresses)]
        self._waiting = deque(seated for seated in self._waiting if seated not in recalled)
        return {address for seated in recalled for address in seated.inside}

    def nodes(self) -> list[Node]:
        """See `Launcher`."""
        return []

    def may_grow(self) -> bool:
        """See `Launcher`."""
        return False

    def most_nodes(self) -> list[Node]:
        """See `Launcher`."""
        return []

    def problems(self, plan: Sequence[Stage], store: Store) -> list[str]:
        """See `Launcher`."""
        return []

    def close(self) -> None:
        """See `Launcher`."""
        self._waiting.clear()
        self._leave()

    def _leave(self) -> None:
        """Have the generator that runs the current jobs tidy up."""
        seated, self._now = self._now, None
        if seated is not None and seated.ends is not None:
            seated.ends.close()
