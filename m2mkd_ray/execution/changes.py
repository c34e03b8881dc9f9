"""Carries out what is asked of an open run: stages come in, and others leave."""

import logging
import time
from collections.abc import Sequence

from m2mkd_ray.execution.admission import Admission
from m2mkd_ray.execution.book import Book
from m2mkd_ray.execution.events import StageWithdrawn
from m2mkd_ray.execution.launcher import Launcher
from m2mkd_ray.execution.locks import Locks
from m2mkd_ray.execution.requests import Add, Requests
from m2mkd_ray.execution.runs import Run, State, in_state
from m2mkd_ray.execution.seating import Seating
from m2mkd_ray.execution.stage import Stage, in_order
from m2mkd_ray.execution.store import Store

logger = logging.getLogger(__name__)

_WITHDRAW_S = 10.0
"""How long a withdrawn stage that has a worker for itself may take to leave it."""


class Changes:
    """The executor's hands for `Requests`."""

    def __init__(
        self,
        runs: dict[str, Run],
        store: Store,
        launcher: Launcher,
        locks: Locks,
        seating: Seating,
        admission: Admission,
        book: Book,
    ) -> None:
        self._runs = runs
        self._store = store
        self._launcher = launcher
        self._locks = locks
        self._seating = seating
        self._admission = admission
        self._book = book

    def carry_out(self, requests: Requests) -> None:
        """Do what was asked since the last time.

        Raises:
            LockedError: another living driver computes one of the stages.
        """
        for request in requests.take():
            if isinstance(request, Add):
                self._add(request.stages)
            else:
                self._withdraw(request.addresses)

    def gone(self, run: Run) -> None:
        """A stage that was to leave its worker has done so."""
        self._book.end_attempt(run, "WITHDRAWN", "it was not wanted any more")
        self._seating.change()
        if run.withdrawn_at is None:  # it is wanted again
            self._store.say_withdrawn(run.stage.address, False)
            run.wait()
        else:
            self.leave(run)

    def leave(self, run: Run) -> None:
        """A withdrawn stage is out of the run, and so is what reads it."""
        self._leave(run)
        for other in in_state(self._runs, State.WAITING):  # in order: a stage comes after its needs
            if any(self._runs[need.address].state is State.WITHDRAWN for need in other.stage.reads.values()):
                self._leave(other)

    def forget(self, run: Run) -> None:
        """A stage is complete; if it was to leave, it was faster."""
        if run.withdrawn_at is not None:
            run.withdrawn_at = None
            self._store.forget_unfinished(run.stage.address)  # all that is left there is the withdrawal

    def watch(self) -> None:
        """End the workers of withdrawn stages that do not leave; not where others would end with them."""
        for run in in_state(self._runs, State.RUNNING):
            is_late = run.withdrawn_at is not None and time.monotonic() - run.withdrawn_at > _WITHDRAW_S
            if is_late and not self._seating.has_mates(run):
                self._launcher.kill(run.stage.address)
                self.gone(run)

    def _add(self, stages: Sequence[Stage]) -> None:
        new = []
        for stage in in_order(stages):
            if (run := self._runs.get(stage.address)) is None:
                run = self._runs[stage.address] = Run(stage)
                new.append(run)
            elif run.state in (State.FAILED, State.SKIPPED, State.WITHDRAWN):
                run.want_again()
                new.append(run)
            elif run.withdrawn_at is not None:  # it has not left yet; if it is about to, it waits again
                run.withdrawn_at = None
                self._store.say_withdrawn(stage.address, False)
        self._admission.let_in(new)
        self._seating.know(self._store.seconds(run.stage.name for run in new if run.state is State.WAITING))
        self._seating.change()

    def _withdraw(self, addresses: Sequence[str]) -> None:
        unwanted = [self._runs[address] for address in addresses if address in self._runs]
        self._seating.recall(unwanted)
        for run in unwanted:
            if run.state is State.RUNNING and run.withdrawn_at is None:
                run.withdrawn_at = time.monotonic()
                self._store.say_withdrawn(run.stage.address, True)
            elif run.state is State.WAITING:
                self.leave(run)

    def _leave(self, run: Run) -> None:
        address, run.withdrawn_at = run.stage.address, None
        self._store.say_withdrawn(address, False)
        self._book.wait_no_longer(run)
        step = self._store.checkpoints(address).newest_step()
        logger.info("%s was withdrawn%s", address, "" if step is None else f"; its checkpoint of step {step} is kept")
        self._book.end(run, State.WITHDRAWN, StageWithdrawn(run.stage, step, run.take_lost_steps()))
        self._locks.release([address])
