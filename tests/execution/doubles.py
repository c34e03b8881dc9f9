"""A launcher whose one node runs nothing; tests say what its worker does."""

from collections.abc import Collection, Sequence

from m2mkd_ray.execution import Resources, Stage, Store
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.job import Job
from m2mkd_ray.execution.reports import Report


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
