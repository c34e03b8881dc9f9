"""Arrays that are a pure function of the step, made once a node for all workers there that need them.

The driver starts a *hub*, an actor that lives and ends with it. A worker asks the
hub for the stream of a key on its node; the hub starts the stream's actor
(`streams.py`) there, or finds it, and replaces one that died. So a worker's death
ends no stream. Who asks for a step that no stream of the key has or will soon have
gets a new one, which others that come as late share with it.

What comes out never depends on any of this: a step that no stream gives (it died, it
gives nothing, its window is gone) is made by the consumer itself, and as the step's
arrays are a pure function of it, they are the same. Streams owned by the first worker
that asks were turned down (its end would end all others' streams), and so were
detached actors (they outlive a killed driver).
"""

import asyncio
import logging
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.cloudpickle
import ray.exceptions
import ray.util.client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2mkd_ray.execution.context import Arrays, Made, Maker
from m2mkd_ray.execution.streams import Counts, Reply, Sharing, Stream

logger = logging.getLogger(__name__)

_TRIES = 3
"""Streams that may die under one step before it is made alone."""
_REJOIN_AFTER = 4
"""Steps in a row that a window had no more, after which a consumer looks for another stream."""
_JOIN_EVERY = 64
"""Steps made alone, after a node had no room for a stream, before it is tried again."""

Place = tuple[str, str]
"""Node and key."""


@dataclass(frozen=True)
class Subscription:
    """A consumer's place at a stream."""

    number: int
    """Of the stream, among the hub's."""
    stream: Any
    """Handle of the `Stream` actor."""


class _Hub:
    """The actor that starts streams, finds them, and ends those that nobody reads."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        self._streams: dict[int, tuple[Place, Any]] = {}
        self._numbers = 0
        self._locks: defaultdict[Place, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._ended = Counts()
        self._sweep: asyncio.Task | None = None

    async def join(
        self, place: Place, maker: bytes, consumer: str, start: int, stop: int, workers: int
    ) -> Subscription | None:
        """A place at a stream that has the step `start`; None if none can be started on the node."""
        self._sweep = self._sweep or asyncio.create_task(self._end_idle())
        async with self._locks[place]:
            for number, (other, stream) in list(self._streams.items()):
                if other == place and await self._joins(number, stream, consumer, start, stop, workers):
                    return Subscription(number, stream)
            number, stream = self._start(place, maker)
            has_joined = await self._joins(number, stream, consumer, start, stop, workers)
            return Subscription(number, stream) if has_joined else None

    async def leave(self, number: int, consumer: str) -> None:
        """A consumer reads no more; the last one's stream ends."""
        if number not in self._streams:
            return
        place, stream = self._streams[number]
        async with self._locks[place]:
            if await self._answer(number, stream.leave.remote(consumer)) == 0:
                await self._end(number, stream)

    async def counts(self) -> Counts:
        """What all streams have done, those that ended too (but for those that died)."""
        asked = {number: stream.counts.remote() for number, (_, stream) in self._streams.items()}
        answers = await asyncio.gather(*(self._answer(number, counts) for number, counts in asked.items()))
        # Those that ended meanwhile are counted among the ended.
        total = self._ended
        for number, counts in zip(asked, answers, strict=True):
            if counts is not None and number in self._streams:
                total += counts
        return total

    async def streams(self) -> list[tuple[Place, Any]]:
        """Place and handle of every stream."""
        return list(self._streams.values())

    def _start(self, place: Place, maker: bytes) -> tuple[int, Any]:
        stream: Any = (
            ray.remote(Stream)
            .options(
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(place[0], soft=False),
            )
            .remote(maker, self._sharing)
        )
        self._numbers += 1
        self._streams[self._numbers] = place, stream
        return self._numbers, stream

    async def life(self) -> None:
        """Never answers: that it fails tells that the hub is gone."""
        await asyncio.Event().wait()

    async def _joins(self, number: int, stream: Any, consumer: str, start: int, stop: int, workers: int) -> bool:
        return bool(await self._answer(number, stream.join.remote(consumer, start, stop, workers)))

    async def _answer(self, number: int, reference: Any) -> Any | None:
        """What a stream says; None if it died or says nothing for too long, and then it is lost."""
        try:
            return await asyncio.wait_for(reference, self._sharing.deadline_s)
        except (ray.exceptions.RayError, TimeoutError) as error:
            self._lost(number, error)
            return None

    def _lost(self, number: int, error: Exception) -> None:
        if (lost := self._streams.pop(number, None)) is not None:
            place, stream = lost
            logger.warning("The stream of %s on node %s is lost: %s", *reversed(place), _brief(error))
            ray.kill(stream)  # it may only be stuck, and its consumers wait

    async def _end(self, number: int, stream: Any) -> None:
        counts = await self._answer(number, stream.counts.remote())
        if counts is not None:
            self._ended += counts  # not `+= await`, which reads the sum before it waits
            self._streams.pop(number, None)
            ray.kill(stream)

    async def _end_idle(self) -> None:
        while True:
            await asyncio.sleep(self._sharing.idle_s / 4)
            for number, (place, stream) in list(self._streams.items()):
                async with self._locks[place]:
                    idle_s = await self._answer(number, stream.idle_s.remote())
                    if idle_s is not None and idle_s > self._sharing.idle_s:
                        await self._end(number, stream)


@dataclass(frozen=True)
class Hub:
    """What workers are given to share streams: pass it as an argument of their actor's method."""

    actor: Any
    """Handle of the hub's actor."""
    sharing: Sharing

    def counts(self, timeout_s: float = 10.0) -> Counts:
        """What all streams have done.

        Raises:
            ray.exceptions.RayError: the hub is gone, or does not answer in time.
        """
        return ray.get(self.actor.counts.remote(), timeout=timeout_s)

    def end(self) -> None:
        """End the hub and all of its streams."""
        ray.kill(self.actor)


def start_hub(sharing: Sharing | None = None) -> Hub:
    """Start the hub of a driver, on its node where that is in the cluster; it and its streams end with the driver."""
    sharing = sharing or Sharing()
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
    if not ray.util.client.ray.is_connected():  # a driver behind `ray://` is on no node
        # Not a soft affinity: Ray then took a worker's node, which the hub held against an autoscaler, or died with.
        here = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    return Hub(ray.remote(_Hub).options(**options).remote(sharing), sharing)


def shared_stream(
    hub: Hub, node_id: str, key: str, maker: Maker, start: int, stop: int, consumer: str, workers: int = 0
) -> Iterator[Made]:
    """`maker()(step)` for the steps `start` to `stop` (exclusive), each made once on the node where it can be.

    Args:
        key: of what is made; one key, one result for a step.
        consumer: who reads, for people; several readers may have the same.
        workers: processes that make steps at the same time, at least one; of all consumers, who asks for most counts.
    """
    reader = _Reader(hub, (node_id, key), maker, stop, f"{consumer}-{uuid.uuid4().hex[:8]}", workers)
    try:
        for step in range(start, stop):
            made = reader.shared(step)
            yield Made(reader.own(step), is_own=True) if made is None else made
    finally:
        reader.leave()


class _Reader:
    """The consumer's side of a stream: asks ahead, and finds another stream when one is lost."""

    def __init__(self, hub: Hub, place: Place, maker: Maker, stop: int, name: str, workers: int) -> None:
        self._hub, self._place, self._maker, self._stop, self._name = hub, place, maker, stop, name
        self._workers = workers
        self._make: Callable[[int], Arrays] | None = None
        self._subscription: Subscription | None = None
        self._asked: deque[tuple[int, Any]] = deque()
        """Steps that were asked for, with the reference of the reply."""
        self._outside = 0
        """Steps in a row that the window did not have."""
        self._is_late = False
        self._join_at = 0
        self._said: set[str] = set()

    def shared(self, step: int) -> Made | None:
        """The step as the stream has it; None if it has to be made here."""
        for _ in range(_TRIES):
            if self._subscription is None and not self._join(step):
                return None
            try:
                return self._received(step)
            except ray.exceptions.RayError as error:
                logger.warning(
                    "%s lost its stream at step %d, looking for another: %s", self._name, step, _brief(error)
                )
                self._forget()
        return None

    def own(self, step: int) -> Arrays:
        """The step, made here."""
        if self._make is None:
            self._make = self._maker()
        return self._make(step)

    def leave(self) -> None:
        """Tell the hub that this consumer reads no more."""
        if self._subscription is not None and ray.is_initialized():
            self._hub.actor.leave.remote(self._subscription.number, self._name)
        self._forget()

    def _join(self, step: int) -> bool:
        if step < self._join_at:
            return False
        asks = self._hub.actor.join.remote(
            self._place, ray.cloudpickle.dumps(self._maker), self._name, step, self._stop, self._workers
        )
        try:
            self._subscription = ray.get(asks, timeout=self._hub.sharing.deadline_s)
        except ray.exceptions.RayError as error:
            is_gone = isinstance(error, ray.exceptions.RayActorError)
            self._join_at = self._stop if is_gone else step + _JOIN_EVERY
            self._say("%s makes steps alone from step %d on: the hub gives no stream: %s", step, _brief(error))
            return False
        if self._subscription is None:
            self._join_at = step + _JOIN_EVERY
            self._say("%s makes steps alone from step %d on: %s", step, "its node cannot hold a stream")
        self._outside, self._is_late = 0, False
        return self._subscription is not None

    def _received(self, step: int) -> Made | None:
        assert self._subscription is not None
        while len(self._asked) < self._hub.sharing.prefetch and step + len(self._asked) < self._stop:
            ahead = step + len(self._asked)
            self._asked.append((ahead, self._subscription.stream.take.remote(self._name, ahead, self._stop)))
        asked, reference = self._asked.popleft()
        assert asked == step, (asked, step)
        deadline_s = self._hub.sharing.deadline_s
        if not ray.wait([reference], timeout=0 if self._is_late else deadline_s)[0]:
            self._is_late = True
            self._say("%s makes step %d alone, and all that are late: no answer for %s s", step, deadline_s)
            return None
        reply: Reply = ray.get(reference)
        self._is_late = False
        if reply.arrays is None:
            self._say("%s makes step %d alone: %s", step, reply.reason)
            self._miss()
            return None
        self._outside = 0
        return Made(ray.get(reply.arrays, timeout=deadline_s), is_own=False, is_first=reply.is_first)

    def _miss(self) -> None:
        self._outside += 1
        if self._outside == _REJOIN_AFTER:
            self.leave()

    def _forget(self) -> None:
        self._subscription = None
        self._asked.clear()

    def _say(self, text: str, *values: object) -> None:
        """Once for each text."""
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, self._name, *values)


def _brief(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"
