"""Workers by shape, kept warm, and the seats that wait for them.

A worker takes seconds to start and to import what it needs, so it belongs to no
stage: as many workers are asked of Ray as seats wait, by what they need and where
(their *shape*), so that an autoscaler sees the whole demand. A seat is handed over
only to a worker that is up and free, first come, first served; a worker that ends
a seat takes the next one of its shape, and requests that this leaves over are
withdrawn. So nothing is bound to a process that may never come, and a lost worker
costs a start, not a place in the queue.

An idle worker holds resources. It is kept only while nothing else could use its
room: no seat of another shape, no placement group (the ranks of a Ray Train job).
It is ended after `keep_idle_s` whatever happens, so that an autoscaler can take its
node back then. A worker that met anything but an expected error is not used again, nor
is one whose node is being drained.

What Ray says comes through callbacks into one queue: `ray.wait` over hundreds of
references costs milliseconds each time, and the driver has many ends a second.
"""

import logging
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import ray.cloudpickle
import ray.exceptions
import ray.util

from m2mkd_ray.execution.failures import Kind
from m2mkd_ray.execution.job import Job, Where
from m2mkd_ray.execution.leaving import LeavingNodes
from m2mkd_ray.execution.ray_worker import ask_for_worker
from m2mkd_ray.execution.reports import Failed, Report, Started
from m2mkd_ray.execution.sharing import Hub, start_hub
from m2mkd_ray.execution.stage import Resources
from m2mkd_ray.execution.store import Store

logger = logging.getLogger(__name__)

_LOOK_FOR_GROUPS_EVERY_S = 1.0
_STARTS = 4
"""How often in a row a worker may die while it starts, before a stage is told of it."""
_RAISED = (
    ray.exceptions.RayTaskError,
    ray.exceptions.RuntimeEnvSetupError,
    ray.exceptions.ActorUnschedulableError,
)
"""What would happen again: exceptions outside the stage's own code, and requests that Ray refuses."""


@dataclass(frozen=True)
class Shape:
    """What makes workers interchangeable."""

    resources: Resources
    node: str | None
    """Id of the node that it has to be on; None: any."""


@dataclass(eq=False)
class _Work:
    """The jobs of a seat."""

    jobs: Sequence[Job]
    store: Store
    shape: Shape
    inside: dict[str, None] = field(init=False)
    """Addresses of those that have not left, in order."""
    is_taken: bool = False
    """Whether a worker has begun with it."""
    deaths: int = 0
    """Workers that were given it and died before they had begun."""

    def __post_init__(self) -> None:
        self.inside = dict.fromkeys(job.address for job in self.jobs)


@dataclass(eq=False)
class _Worker:
    """An actor that was asked for."""

    actor: Any
    shape: Shape
    where: Where | None = None
    """None until it is up."""
    work: _Work | None = None
    idle_since: float = 0.0
    is_spoilt: bool = False
    """Whether it met something after which a process is not to be trusted."""

    @property
    def is_idle(self) -> bool:
        return self.where is not None and self.work is None

    def fits(self, shape: Shape) -> bool:
        """Whether it may do what is asked of a worker of this shape."""
        return self.shape.resources == shape.resources and self.is_where(shape)

    def is_where(self, shape: Shape) -> bool:
        """Whether it is where a worker of this shape may be."""
        return self.where is not None and shape.node in (None, self.where["node_id"])


class Pool:
    """The workers of one driver.

    Args:
        keep_idle_s: how long a worker may wait for another seat; 0: none is given a second one.
        prewarm: names of modules that a worker imports before its second seat.
    """

    def __init__(self, keep_idle_s: float, prewarm: Sequence[str]) -> None:
        self._keep_idle_s = keep_idle_s
        self._prewarm = tuple(prewarm)
        self._queue: list[_Work] = []
        self._workers: dict[_Worker, None] = {}  # a set that keeps its order: the oldest first
        self._inbox: queue.SimpleQueue[tuple[_Worker, _Work | None, Future[Any]]] = queue.SimpleQueue()
        """Who answered, of which work (None: that it is up), and what."""
        self._next_look = 0.0
        self._hub: Hub | None = None
        """Of what workers share; there with the first seat that is handed out."""
        self._has_hub_died = threading.Event()
        self._leaving = LeavingNodes()
        self._lost_starts: Counter[Shape] = Counter()
        """Workers that died while they started, since one of the shape last came up."""

    def submit(self, jobs: Sequence[Job], store: Store, shape: Shape, *, goes_first: bool = False) -> None:
        """Queue a seat, as the last or as the first."""
        self._queue.insert(0 if goes_first else len(self._queue), _Work(jobs, store, shape))

    def poll(self, timeout_s: float) -> list[Report]:
        """Hand out what can be handed out, and tell what happened; waits up to `timeout_s` for something."""
        self._hand_out()
        reports: list[Report] = []
        try:
            heard = self._inbox.get(timeout=timeout_s)
            while True:
                reports += self._hear(*heard)
                heard = self._inbox.get_nowait()
        except queue.Empty:
            pass
        self._hand_out()
        return reports

    def kill(self, address: str) -> set[str]:
        """End the worker that has a job, or withdraw its seat; gives the others that were in it."""
        for worker in list(self._workers):
            if worker.work is not None and address in worker.work.inside:
                self._end(worker)
                return set(worker.work.inside) - {address}
        return self.recall([address]) - {address}

    def recall(self, addresses: Collection[str]) -> set[str]:
        """Withdraw seats that no worker has been given; gives the addresses of all their jobs."""
        wanted = set(addresses)
        recalled = [work for work in self._queue if not wanted.isdisjoint(work.inside)]
        for work in recalled:
            self._queue.remove(work)
        return {address for work in recalled for address in work.inside}

    def close(self) -> None:
        """End all workers."""
        self._queue.clear()
        for worker in list(self._workers):
            self._end(worker)
        if self._hub is not None:
            self._hub.end()
            self._hub = None

    # Workers and what they are given

    def _hand_out(self) -> None:
        """Give seats to free workers, and have as many more workers on their way as seats wait."""
        for worker in [worker for worker in self._workers if worker.is_idle]:
            if worker.where is not None and worker.where["node_id"] in self._leaving.look():
                self._end(worker)
            elif (work := next((work for work in self._queue if worker.fits(work.shape)), None)) is not None:
                self._queue.remove(work)
                self._give(worker, work)
        waiting = Counter(work.shape for work in self._queue)
        coming: dict[Shape, list[_Worker]] = defaultdict(list)
        for worker in self._workers:
            if worker.where is None:
                coming[worker.shape].append(worker)
        for shape in waiting.keys() | coming.keys():
            for worker in coming[shape][waiting[shape] :]:
                self._end(worker)  # the youngest: the oldest may be about to come up
            for _ in range(waiting[shape] - len(coming[shape])):
                self._ask(shape)
        self._make_room(list(waiting))

    def _make_room(self, waiting: Sequence[Shape]) -> None:
        """End workers that have been idle for too long, or that hold what others wait for."""
        idle = [worker for worker in self._workers if worker.is_idle]
        if not idle:
            return
        are_all_in_the_way = self._does_a_group_wait()
        for worker in idle:
            is_in_the_way = are_all_in_the_way or any(worker.is_where(shape) for shape in waiting)
            if is_in_the_way or time.monotonic() - worker.idle_since > self._keep_idle_s:
                self._end(worker)

    def _does_a_group_wait(self) -> bool:
        """Whether a placement group waits for room; looked for at most once a second."""
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_FOR_GROUPS_EVERY_S
        return any(
            group["state"] in ("PENDING", "RESCHEDULING") for group in ray.util.placement_group_table().values()
        )

    def _ask(self, shape: Shape) -> None:
        worker = _Worker(ask_for_worker(shape.resources, shape.node), shape)
        self._workers[worker] = None
        self._listen(worker, None, worker.actor.where.remote())

    def _give(self, worker: _Worker, work: _Work) -> None:
        """Everything that the worker has to do is asked for at once, so that it never waits for the driver."""
        worker.work, hub = work, self._living_hub()
        pickled = ray.cloudpickle.dumps(list(work.jobs))
        self._listen(worker, work, worker.actor.take.remote(pickled, list(work.inside), work.store, hub))
        for _ in work.inside:
            self._listen(worker, work, worker.actor.next.remote())
        worker.actor.rest.remote(self._prewarm)

    def _living_hub(self) -> Hub:
        """The hub, or another one if it died: workers that have begun do without, those that begin have it."""
        if self._hub is None or self._has_hub_died.is_set():
            if self._hub is not None:
                logger.warning("What starts the shared streams died; another one takes its place")
            self._hub, self._has_hub_died = start_hub(), threading.Event()
            has_died = self._has_hub_died
            self._hub.actor.life.remote().future().add_done_callback(lambda _: has_died.set())
        return self._hub

    def _end(self, worker: _Worker) -> None:
        del self._workers[worker]
        ray.kill(worker.actor)

    # What they say

    def _listen(self, worker: _Worker, work: _Work | None, reference: Any) -> None:
        reference.future().add_done_callback(lambda future: self._inbox.put((worker, work, future)))

    def _hear(self, worker: _Worker, work: _Work | None, future: "Future[Any]") -> list[Report]:
        if worker not in self._workers:
            return []  # it was ended, or its death was told already
        try:
            result = future.result()
        except ray.exceptions.RayError as error:
            return self._lose(worker, error)
        if work is None:
            worker.where, worker.idle_since = result, time.monotonic()
            del self._lost_starts[worker.shape]
            return []
        started = self._start(worker, work)
        return started if result is None else [*started, self._leave(worker, work, result)]

    def _start(self, worker: _Worker, work: _Work) -> list[Report]:
        """The first sign that a worker has taken its work."""
        if work.is_taken:
            return []
        assert worker.where is not None
        work.is_taken, addresses = True, list(work.inside)
        where = worker.where if len(addresses) == 1 else {**worker.where, "cohort": addresses}
        return [Started(address, where) for address in addresses]

    def _leave(self, worker: _Worker, work: _Work, end: Report) -> Report:
        """A member came to its end; after the last one the worker is free."""
        del work.inside[end.address]
        if isinstance(end, Failed) and (end.error is None or end.kind in (Kind.OUT_OF_MEMORY, Kind.PREEMPTED)):
            worker.is_spoilt = True
        if not work.inside:
            worker.work, worker.idle_since = None, time.monotonic()
            if worker.is_spoilt or not self._keep_idle_s:
                self._end(worker)
        return end

    def _lose(self, worker: _Worker, error: ray.exceptions.RayError) -> list[Report]:
        """A worker died, or was never to be had."""
        self._end(worker)
        if worker.work is None:
            return self._lose_at_start(worker, error)
        worker.work.deaths += 1
        if not worker.work.is_taken and worker.work.deaths < _STARTS and not isinstance(error, _RAISED):
            logger.info("A worker died while it was idle; %s gets another one", ", ".join(worker.work.inside))
            self._queue.insert(0, worker.work)
            return []
        return [failed(address, error) for address in worker.work.inside]

    def _lose_at_start(self, worker: _Worker, error: ray.exceptions.RayError) -> list[Report]:
        """A worker never came up. No seat is to blame; but where it goes on, the first that waits is told of it."""
        self._lost_starts[worker.shape] += 1
        work = next((work for work in self._queue if work.shape == worker.shape), None)
        is_final = isinstance(error, _RAISED) or self._lost_starts[worker.shape] >= _STARTS
        if work is None or not is_final:
            return []
        self._queue.remove(work)
        told = [failed(address, error) for address in work.inside]
        if isinstance(error, ray.exceptions.ActorUnschedulableError) and worker.shape.node is not None:
            return [replace(one, kind=Kind.PREEMPTED) for one in told]  # the node that it was to be on is gone
        return list(told)


def failed(address: str, error: ray.exceptions.RayError) -> Failed:
    """What Ray says of a stage that did not come back, by kind."""
    exceptions = ray.exceptions
    if isinstance(error, exceptions.OutOfMemoryError):
        kind = Kind.OUT_OF_MEMORY
    elif isinstance(error, exceptions.RayActorError) and error.preempted:
        kind = Kind.PREEMPTED
    elif isinstance(error, _RAISED) or (isinstance(error, exceptions.RayActorError) and error.actor_init_failed):
        kind = Kind.RAISED
    else:
        # ActorDiedError, ActorUnavailableError, WorkerCrashedError, NodeDiedError, lost objects: the machine's fault.
        kind = Kind.LOST
    text = str(error).strip() or type(error).__name__
    return Failed(address, kind, f"{type(error).__name__}: {text.splitlines()[0]}", traceback=text)
