"""Launchers whose one node runs nothing until a test says so; tests say what its worker does."""

import time
from collections.abc import Collection, Sequence

from m2mkd_ray.execution import Progress, Resources, Stage, Store
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.job import Job, here
from m2mkd_ray.execution.reports import Finished, Report, Started
from m2mkd_ray.execution.worker import run_job


class Desk:
    """A launcher that runs nothing, and notes what it is given and what it is told to kill."""

    runs_in_process = False

    def __init__(self) -> None:
        self.given: list[list[str]] = []
        self.killed: list[str] = []

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
        self.given.append([one.name for one in jobs])

    def poll(self, timeout_s: float) -> list[Report]:
        """See `Launcher`."""
        return []

    def kill(self, address: str) -> set[str]:
        """See `Launcher`."""
        self.killed.append(address)
        return set()

    def recall(self, addresses: Collection[str]) -> set[str]:
        """See `Launcher`."""
        return set()

    def nodes(self) -> list[Node]:
        """See `Launcher`."""
        return [Node("here", {"CPU": 1.0})]

    def problems(self, plan: Sequence[Stage], store: Store) -> list[str]:
        """See `Launcher`."""
        return []

    def close(self) -> None:
        """See `Launcher`."""


class Worker(Desk):
    """A launcher with a worker that runs for as many polls as it has to say something, and then ends its jobs.

    It says steps (step, of how many, and whose: the place of the job), nothing (None), or that a job is done and has
    left ("left 1": the one in place 1).
    """

    def __init__(self, says: Sequence[tuple[int, ...] | str | None]) -> None:
        super().__init__()
        self._says = says
        self._todo: list[tuple[int, ...] | str | None] = []

    def submit(self, jobs: Sequence[Job], store: Store, *where: object, **how: object) -> None:
        """See `Launcher`."""
        self._jobs, self._store, self._inside = jobs, store, list(jobs)
        self._todo = ["start", *self._says, "end"]

    def poll(self, timeout_s: float) -> list[Report]:
        """See `Launcher`."""
        time.sleep(0.01)
        match self._todo.pop(0):
            case "start":
                return [Started(job.address, here()) for job in self._jobs]
            case "end":
                return [self._end(job) for job in list(self._inside)]
            case str(left):
                return [self._end(self._jobs[int(left.removeprefix("left "))])]
            case (step, total, *place):
                progress = Progress(step, total, {}, time.time(), 1, "here")
                self._store.say_progress(self._jobs[place[0] if place else 0].address, progress)
        return []

    def kill(self, address: str) -> set[str]:
        """See `Launcher`."""
        super().kill(address)
        others = {job.address for job in self._inside} - {address}
        self._inside.clear()
        return others

    def _end(self, job: Job) -> Finished:
        self._inside.remove(job)
        return Finished(job.address, run_job(job, self._store, here()))
