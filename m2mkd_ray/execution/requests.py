"""What is asked of a run that is *open*: stages are added to it, and withdrawn from it, while it goes on.

A run is open until it is closed. A search over settings keeps one open: it adds the
stages of what it wants to try, and withdraws those that are not worth going on with.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from m2mkd_ray.execution.stage import Stage


@dataclass(frozen=True)
class Add:
    """Run these, and what they read."""

    stages: Sequence[Stage]


@dataclass(frozen=True)
class Withdraw:
    """Do not run these any further."""

    addresses: Sequence[str]


class Requests:
    """The way into an open run, from any thread. Requests are carried out in the order in which they were made."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._inbox: list[Add | Withdraw] = []
        self._is_closed = self._is_cancelled = False

    def add(self, stages: Iterable[Stage]) -> None:
        """Run stages, and what they read. What is added at once can share a worker.

        One that was withdrawn goes on from its newest checkpoint; one that failed is tried anew.

        Raises:
            RuntimeError: the run is closed.
        """
        with self._guard:
            if self._is_closed:
                raise RuntimeError("Stages were added to a run that is closed. Add them before `close()`.")
            self._inbox.append(Add(tuple(stages)))

    def withdraw(self, addresses: Iterable[str]) -> None:
        """Do not run stages any further, nor those that read them; checkpoints are kept.

        One that is running leaves with its next report, from a cohort alone; one that a worker has for itself and
        that says nothing for a while is ended.
        """
        with self._guard:
            self._inbox.append(Withdraw(tuple(addresses)))

    def close(self) -> None:
        """Nothing more will be added: the run ends when nothing is left to do."""
        with self._guard:
            self._is_closed = True

    def cancel(self) -> None:
        """End the run now, as an interrupt does: `execute` raises KeyboardInterrupt."""
        with self._guard:
            self._is_closed = self._is_cancelled = True

    def take(self) -> list[Add | Withdraw]:
        """What was asked since the last call, in order."""
        with self._guard:
            taken, self._inbox = self._inbox, []
            return taken

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        with self._guard:
            return self._is_closed and not self._inbox

    @property
    def is_cancelled(self) -> bool:
        """Whether the run is to end now."""
        with self._guard:
            return self._is_cancelled
