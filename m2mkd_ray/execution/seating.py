"""Asks for seats, submits them, and takes them back: the executor's hands for `placement.Placer`.

Late binding: all that is ready is submitted, so that an autoscaler sees the whole
demand, but a seat that no worker has taken up yet is not settled. It is recalled
when nodes come or go, if the placer plans for nodes, and when no node can hold it.
"""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from m2mkd_ray.execution.ahead import Ahead
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.job import Where, job
from m2mkd_ray.execution.launcher import Launcher
from m2mkd_ray.execution.placement import GATHER_S, Occupied, Placer, Seat, View
from m2mkd_ray.execution.runs import Run, Seated, State
from m2mkd_ray.execution.stage import Stage
from m2mkd_ray.execution.store import Store

logger = logging.getLogger(__name__)

_NODES_EVERY_S = 3.0


class Seating:
    """The seats of a run."""

    def __init__(
        self, runs: Mapping[str, Run], store: Store, launcher: Launcher, placer: Placer, ahead: Ahead | None = None
    ) -> None:
        self._runs = runs
        self._store = store
        self._launcher = launcher
        self._placer = placer
        self._ahead = ahead
        self._seconds: dict[str, float] = {}
        self._nodes: list[Node] | None = None
        """Those that were there at the last look; None before the first."""
        self._next_look = 0.0
        self._left_out: set[str] = set()
        self._ready: dict[str, float] = {}
        """Monotonic time at which stages that wait for a seat were first ready, by address."""
        self._has_changed = True
        self._ask_at = math.inf
        """Monotonic time at which to ask again about what was left out, though nothing has changed."""

    def know(self, seconds: Mapping[str, float]) -> None:
        """How long stages of these names took."""
        for name, took in seconds.items():
            self._seconds[name] = max(took, self._seconds.get(name, 0.0))

    def change(self) -> None:
        """Something happened: what was left out is to be asked about again."""
        self._has_changed = True

    def fill(self, ready: Sequence[Run]) -> None:
        """Ask for seats for what is ready, and submit them; what is left out waits until something has changed."""
        addresses, now = {run.stage.address for run in ready}, time.monotonic()
        is_as_before = addresses == self._left_out and not self._has_changed and now < self._ask_at
        if not ready or is_as_before:
            return
        if self._nodes is None:
            self._nodes = self._launcher.nodes()
        self._ready = {address: self._ready.get(address, now) for address in addresses}
        for seat in self._placer.seats([run.offered for run in ready], self._view()):
            self._submit(seat)
            addresses -= {stage.address for stage in seat.stages}
        self._left_out, self._has_changed = addresses, False
        gathered = (self._ready[address] + GATHER_S for address in addresses)
        self._ask_at = min((at for at in gathered if at > now), default=math.inf)

    def _submit(self, seat: Seat) -> None:
        seated = Seated(seat)
        for stage in seat.stages:
            self._runs[stage.address].sit(seated, self._store.progress(stage.address))
        # What was begun had its turn before what still waits; at the end of the queue it would end the run late.
        has_begun = any(self._runs[stage.address].has_begun for stage in seat.stages)
        jobs = [job(stage) for stage in seat.stages]
        self._launcher.submit(jobs, self._store, seat.node, seat.resources, goes_first=has_begun)

    def _view(self) -> View:
        running = [run for run in self._runs.values() if run.state is State.RUNNING]
        inside: dict[Seated, set[str]] = {}
        for run in running:
            if run.seated is not None:
                inside.setdefault(run.seated, set()).add(run.stage.address)
        now = time.monotonic()
        occupied = [
            Occupied(
                replace(seated.seat, stages=tuple(stage for stage in seated.seat.stages if stage.address in members)),
                seated.node,
                now - seated.since if seated.since else 0.0,
            )
            for seated, members in inside.items()
        ]
        # In one process everything runs in turn, and nothing idles while a stage waits.
        ready_s = {} if self._launcher.runs_in_process else {at: now - since for at, since in self._ready.items()}
        return View(self._nodes or [], occupied, self._seconds, self._coming(), ready_s)

    def _coming(self) -> list[Stage]:
        """Stages that wait for nothing but what is complete, or what a worker has begun."""
        return [
            run.offered
            for run in self._runs.values()
            if run.state is State.WAITING
            and run.stage.address not in self._ready
            and all(self._is_soon_complete(self._runs[read.address]) for read in run.stage.reads.values())
        ]

    def _is_soon_complete(self, run: Run) -> bool:
        has_begun = run.started is not None or self._launcher.runs_in_process
        return run.state is State.COMPLETE or (run.state is State.RUNNING and has_begun)

    def take_up(self, run: Run, where: Where) -> None:
        """A worker began with a stage."""
        run.where, run.started, run.has_begun = where, time.monotonic(), True
        if run.seated is not None and not run.seated.since:
            run.seated.node, run.seated.since = where.get("node_id"), run.started

    def recall(self, runs: Iterable[Run]) -> list[Run]:
        """Take back seats that nobody has taken up, with all their stages; gives the runs that wait again."""
        addresses = [run.stage.address for run in runs if run.state is State.RUNNING and run.started is None]
        recalled = [self._runs[address] for address in self._launcher.recall(addresses)] if addresses else []
        for run in recalled:
            run.wait()
        self._has_changed = True
        return recalled

    def has_mates(self, run: Run) -> bool:
        """Whether others are at work in its worker."""
        return bool(self._mates(run))

    def silence_s(self, run: Run) -> float:
        """Seconds for which a report has been due of a stage; 0 where none is (`Run.silence_s`).

        Before its first report one is due when nobody who has reported is left in its worker: until then it may wait
        for mates that are behind it.
        """
        if run.changed is not None:
            return run.silence_s
        has_to_wait = any(mate.changed is not None for mate in self._mates(run))
        if run.seated is None or not run.seated.heard or has_to_wait or run.is_after_last_step:
            return 0.0
        return time.monotonic() - run.seated.heard

    def _mates(self, run: Run) -> list[Run]:
        others = (other for other in self._runs.values() if other is not run and other.seated is run.seated)
        return [other for other in others if other.state is State.RUNNING]

    # Nodes

    def ask_ahead(self) -> None:
        """Have nodes brought for what becomes ready soon, if somebody was given that asks for them."""
        if self._ahead is not None:
            self._ahead.look(self._runs, self._seconds)

    def ask_no_more(self) -> None:
        """Withdraw what was asked for ahead."""
        if self._ahead is not None:
            self._ahead.end()

    def look_at_nodes(self) -> bool:
        """Whether nodes have come or gone since the last look; looked for every few seconds."""
        if self._launcher.runs_in_process or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _NODES_EVERY_S
        before, self._nodes = self._nodes, self._launcher.nodes()
        if before is None or {node.id for node in before} == {node.id for node in self._nodes}:
            return False
        logger.info("%d nodes are there, before there were %d", len(self._nodes), len(before))
        return True

    def replan(self) -> None:
        """Have what nobody has taken up placed again, if the placer plans for nodes."""
        self._has_changed = True
        if self._placer.replans:
            self.recall(self._runs.values())

    def lacking(self, runs: Iterable[Run]) -> dict[str, str]:
        """By address, what is missing for stages that wait for a worker and that no node can hold."""
        if self._launcher.runs_in_process:
            return {}
        view = self._view()
        reasons = {run.stage.address: self._placer.lacks(run.as_seated, view) for run in runs}
        return {address: reason for address, reason in reasons.items() if reason is not None}
