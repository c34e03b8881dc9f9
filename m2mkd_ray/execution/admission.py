"""Lets stages into a run: what is complete is reused, the rest is locked and its place in the store made free."""

import logging
from collections.abc import Sequence

from m2mkd_ray.execution.book import Book
from m2mkd_ray.execution.events import StageReused
from m2mkd_ray.execution.locks import Locks
from m2mkd_ray.execution.runs import Run, State
from m2mkd_ray.execution.stage import Stage
from m2mkd_ray.execution.store import Store

logger = logging.getLogger(__name__)


class Admission:
    """What stands between a stage and its first launch."""

    def __init__(self, store: Store, locks: Locks, book: Book) -> None:
        self._store = store
        self._locks = locks
        self._book = book

    def let_in(self, runs: Sequence[Run], verify: bool = False) -> None:
        """Find what is complete, lock the rest, and put what is spoilt in quarantine.

        Raises:
            LockedError: another living driver computes one of them; none is locked.
        """
        todo = [run for run in runs if not self._reuse(run, verify)]
        self._locks.acquire(run.stage.address for run in todo)
        for run in todo:
            # Between the first look and our lock, another driver may have completed it.
            if self._reuse(run, verify):
                self._locks.release([run.stage.address])
                continue
            self.clear(run.stage)
            if self._store.waits(run.stage.address):  # of a driver that was killed
                self._store.say_waits(run.stage.address, "")
            if self._store.is_withdrawn(run.stage.address):
                self._store.say_withdrawn(run.stage.address, False)
        self._sweep(runs)

    def clear(self, stage: Stage) -> None:
        """Make the place of an artifact free; we hold its lock."""
        status = self._store.status(stage.address, verify=True)
        if status.state == "spoilt":
            self._store.quarantine(stage.address, "; ".join(status.problems))
        elif status.state != "complete" and self._store.folders.names(stage.address):
            self._store.quarantine(stage.address, "it has no manifest")

    def _reuse(self, run: Run, verify: bool) -> bool:
        status = self._store.status(run.stage.address, verify=verify)
        if status.state != "complete" or status.manifest is None:
            return False
        reused = StageReused(run.stage, status.manifest["seconds"], status.manifest["metrics"])
        self._book.end(run, State.COMPLETE, reused)
        return True

    def _sweep(self, runs: Sequence[Run]) -> None:
        """Delete unfinished work of complete stages, which a kill in a commit leaves."""
        complete = {run.stage.address for run in runs if run.state is State.COMPLETE}
        for address in complete.intersection(self._store.unfinished()):
            try:
                self._store.forget_unfinished(address)
            except OSError as error:  # another user's, perhaps; it hinders nobody
                logger.warning("The unfinished work of %s, which is complete, stays: %s", address, error)
