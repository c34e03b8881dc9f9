"""An actor that makes the arrays of each step once, for all workers of its node that read the same stream.

It holds a window of steps in the node's object store: a step is put there once and
mapped by every reader, without a copy. It makes ahead as long as the window has
room. Room comes from steps that every consumer has taken, so the fastest consumer is
never more than a window ahead of the slowest. One that asks for nothing, though
others wait for room, is let go after `patience_s`: it may be dead, and if it comes
back, it makes its own until it finds a window that has its step.

Making is done by its *hands*, actors beside it: more than one where one process
cannot make as fast as the node trains, and one that dies takes no made step with it,
as the stream owns what they return. All state is changed in the stream's event loop,
so there are no locks. The consumer's side and the hub, which starts and ends these
actors, are in `sharing.py`.
"""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.cloudpickle
import ray.exceptions
from pydantic import BaseModel, Field
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Arrays = tuple[np.ndarray, ...]

_MIN_STEPS = 4
"""Held if each is at most a quarter of the window's bytes, as this must be."""
_MIN_LARGE_STEPS = 2
"""Held whatever their size; with fewer, a maker and its consumers would wait for each other in turns. Where there are
more hands, as many as these, or they would have nothing to do."""
_REACH = 16
"""Steps by which a new consumer may be off the window. All consumers of a stream that died come back within it."""
_TICK_S = 0.5
_DEATHS = 2
"""Hands that may die of a step before its consumers have to make it."""

logger = logging.getLogger(__name__)


class Sharing(BaseModel, frozen=True, extra="forbid"):
    """How workers of a node share what is made; changes only speed and memory, never what is made."""

    window_bytes: int = Field(96_000_000, gt=0)
    """Made arrays that a stream holds in the object store (at least 2 steps, and one for each hand); each consumer
    adds what it has in hand: up to `prefetch` steps and the one it works on."""
    prefetch: int = Field(3, gt=0)
    """Steps that a consumer has asked for ahead."""
    patience_s: float = Field(20.0, gt=0)
    """A consumer that asks for nothing so long, while others wait for room in the window, is let go."""
    deadline_s: float = Field(60.0, gt=0)
    """A stream or hub that gives nothing for so long is not waited for: the consumer makes the step alone."""
    gather_s: float = Field(5.0, ge=0)
    """A new stream drops nothing for so long, so that workers which start at about the same time share all of it."""
    idle_s: float = Field(300.0, gt=0)
    """A stream that nobody has asked for so long ends: its consumers are dead."""
    hands: int = Field(1, gt=0)
    """Fewest processes that make the steps of a stream, whatever its consumers ask for (`workers`); as many steps are
    made at the same time."""
    cpus: float = Field(0.0, ge=0)
    """CPU cores that each hand reserves; 0 starts on a node that is full, as the workers' own loading would."""


@dataclass(frozen=True)
class Counts:
    """What streams have done."""

    made: int = 0
    """Steps made."""
    handed: int = 0
    """Times that a step was given to a consumer."""
    let_go: int = 0
    """Consumers that were not waited for."""
    cpu_s: float = 0.0
    """CPU seconds of making, of the processes that do it."""
    peak_bytes: int = 0
    """Most that a window held."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.made + other.made,
            self.handed + other.handed,
            self.let_go + other.let_go,
            self.cpu_s + other.cpu_s,
            max(self.peak_bytes, other.peak_bytes),
        )


@dataclass(frozen=True)
class Reply:
    """The answer to a consumer that asked for a step."""

    arrays: ray.ObjectRef | None
    """In the node's object store; None: the consumer makes the step itself."""
    reason: str = ""
    is_first: bool = False
    """Whether nobody was given it before."""


@dataclass
class _Consumer:
    given: int
    """After the last step that it was given."""
    stop: int
    asked: float = field(default_factory=time.monotonic)
    waiting: set[int] = field(default_factory=set)
    """Steps that it asked for and was not given yet."""

    @property
    def position(self) -> int:
        """The first step that it still needs; answers may overtake each other."""
        return min((*self.waiting, self.given))


@dataclass(frozen=True)
class _Step:
    arrays: ray.ObjectRef
    bytes: int


@dataclass(frozen=True)
class _Cost:
    bytes: int
    cpu_s: float


class Hand:
    """An actor that makes steps. The maker comes pickled, so that threads are set before it imports anything."""

    def __init__(self, maker: bytes) -> None:
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._pickled = maker
        self._make: Callable[[int], Arrays] | None = None

    def make(self, step: int) -> tuple[Arrays, _Cost]:
        """The step's arrays, and what they cost."""
        if self._make is None:
            self._make = ray.cloudpickle.loads(self._pickled)()
        began = time.process_time()
        arrays = tuple(np.ascontiguousarray(array) for array in self._make(step))
        return arrays, _Cost(sum(array.nbytes for array in arrays), time.process_time() - began)

    def pid(self) -> int:
        """Its process."""
        return os.getpid()


class Stream:
    """The actor of a stream."""

    def __init__(self, maker: bytes, sharing: Sharing) -> None:
        self._pickled, self._sharing = maker, sharing
        self._hands: list[Any] = []
        """Those that have nothing to do."""
        self._num_hands = 0
        self._consumers: dict[str, _Consumer] = {}
        self._made: dict[int, _Step] = {}
        self._untaken: set[int] = set()
        """Those of them that nobody was given yet."""
        self._making: dict[int, asyncio.Task] = {}
        self._deaths: Counter[int] = Counter()
        self._failed: dict[int, str] = {}
        self._low: int | None = None
        """No step before it is made (any more); None as long as nobody has joined."""
        self._first = 0
        self._gathers_until = 0.0
        self._counts = Counts()
        self._step_bytes = 0
        self._changed = asyncio.Condition()
        self._work: asyncio.Task | None = None

    async def join(self, consumer: str, start: int, stop: int, workers: int) -> bool:
        """Whether the window has the step `start`, or will have it soon; if so, the consumer is waited for.

        There are as many hands from now on as the consumer asks for (`workers`), or more.
        """
        if self._low is None:
            self._low = self._first = start
            self._gathers_until = time.monotonic() + self._sharing.gather_s
            self._work = asyncio.create_task(self._make_ahead())
        if self._is_gathering and self._low - _REACH <= start:
            self._low = min(self._low, start)
        if not self._low <= start <= self._end + _REACH:
            return False
        self._consumers[consumer] = _Consumer(start, stop)
        while self._num_hands < max(workers, self._sharing.hands):
            self._hands.append(self._hand())
            self._num_hands += 1
        await self._say()
        return True

    async def take(self, consumer: str, step: int, stop: int) -> Reply:
        """The step's arrays, as soon as they are made."""
        assert self._low is not None
        if not self._has(step):
            return self._outside(step)
        # One that was let go and asks for a step of the window is waited for again.
        mine = self._consumers.setdefault(consumer, _Consumer(step, stop))
        mine.asked = time.monotonic()
        mine.waiting.add(step)
        await self._say()
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_done(step) or not self._has(step))
        mine.asked = time.monotonic()
        if step in self._made:
            reply = Reply(self._made[step].arrays, is_first=step in self._untaken)
            self._untaken.discard(step)
            self._counts += Counts(handed=1)
        elif step in self._failed:
            reply = Reply(None, f"making step {step} failed: {self._failed[step]}")
        else:
            reply = self._outside(step)
        mine.waiting.discard(step)
        mine.given = max(mine.given, step + 1)
        await self._say()
        return reply

    async def leave(self, consumer: str) -> int:
        """No longer wait for a consumer; returns how many are left."""
        self._consumers.pop(consumer, None)
        await self._say()
        return len(self._consumers)

    async def counts(self) -> Counts:
        """What it has done so far."""
        return self._counts

    async def idle_s(self) -> float:
        """Seconds since anybody asked for anything."""
        consumers = self._consumers.values()
        if any(consumer.waiting for consumer in consumers):
            return 0.0
        return time.monotonic() - max((consumer.asked for consumer in consumers), default=0.0)

    async def pids(self) -> list[int]:
        """Its process, and those of its hands that have nothing to do."""
        return [os.getpid(), *[await hand.pid.remote() for hand in self._hands]]

    @property
    def _is_gathering(self) -> bool:
        return time.monotonic() < self._gathers_until

    @property
    def _end(self) -> int:
        """After the last step that was made."""
        assert self._low is not None
        return max((*self._made, self._low - 1)) + 1

    def _has(self, step: int) -> bool:
        assert self._low is not None
        return step >= self._low

    def _outside(self, step: int) -> Reply:
        return Reply(None, f"step {step} is gone, the window begins at step {self._low}")

    async def _say(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _make_ahead(self) -> None:
        while True:
            step = self._next() if self._hands else None
            if step is None:
                await self._wait()
            else:
                self._making[step] = asyncio.create_task(self._make(step, self._hands.pop()))

    async def _make(self, step: int, hand: Any) -> None:
        arrays, cost = hand.make.options(num_returns=2).remote(step)
        try:
            known = await cost
        except ray.exceptions.RayTaskError as error:  # its consumers make the step, and raise it where it is read
            self._failed[step] = str(error.cause)
        except ray.exceptions.RayError as error:
            logger.warning("A hand died at step %d, another takes its place: %s", step, error)
            self._deaths[step] += 1
            if self._deaths[step] == _DEATHS:
                self._failed[step] = "the processes that made it died"
            hand = self._hand()
        else:
            self._made[step], self._step_bytes = _Step(arrays, known.bytes), known.bytes
            self._untaken.add(step)
            self._counts += Counts(made=1, cpu_s=known.cpu_s, peak_bytes=self._held)
        self._hands.append(hand)
        del self._making[step]
        await self._say()

    def _hand(self) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": self._sharing.cpus, "max_restarts": 0, "scheduling_strategy": here}
        return ray.remote(Hand).options(**options).remote(self._pickled)

    async def _wait(self) -> None:
        """Until something changes, or the time has come to look who is late."""
        try:
            async with asyncio.timeout(_TICK_S), self._changed:
                await self._changed.wait()
        except TimeoutError:
            return

    @property
    def _held(self) -> int:
        return sum(step.bytes for step in self._made.values())

    def _next(self) -> int | None:
        """The step to make now, after room was made for it; None if there is none, or no room."""
        if not self._consumers:
            return None
        slowest = min(consumer.position for consumer in self._consumers.values())
        stop = max(consumer.stop for consumer in self._consumers.values())
        waits = (step for step in range(slowest, stop) if not self._is_done(step) and step not in self._making)
        step = next(waits, None)
        if step is None:
            return None
        self._drop_before(slowest)
        # What the slowest itself waits for is always made: where it joined below what is there already.
        if self._has_room or (step == slowest and not self._is_held(step)):
            return step
        return self._next() if self._let_go() else None

    def _is_done(self, step: int) -> bool:
        return step in self._made or step in self._failed

    def _is_held(self, step: int) -> bool:
        """Whether it is of the beginning, which is held for those who are about to join."""
        return self._is_gathering and step >= self._first

    @property
    def _has_room(self) -> bool:
        coming = (len(self._making) + 1) * self._step_bytes
        is_large = self._step_bytes > self._sharing.window_bytes / _MIN_STEPS
        fewest = max(_MIN_LARGE_STEPS, self._num_hands) if is_large else _MIN_STEPS
        return len(self._made) + len(self._making) < fewest or self._held + coming <= self._sharing.window_bytes

    def _drop_before(self, slowest: int) -> None:
        """Drop steps that all have taken, oldest first, until there is room."""
        for step in sorted(self._made):
            if self._has_room or step >= slowest or self._is_held(step):
                break
            del self._made[step]
            self._untaken.discard(step)
            self._low = step + 1
        self._failed = {step: why for step, why in self._failed.items() if self._has(step)}

    def _let_go(self) -> bool:
        """Let those go who ask for nothing while others wait; whether there were any."""
        if not any(consumer.waiting for consumer in self._consumers.values()):
            return False
        before = time.monotonic() - self._sharing.patience_s
        late = [name for name, one in self._consumers.items() if not one.waiting and one.asked < before]
        for name in late:
            del self._consumers[name]
        self._counts += Counts(let_go=len(late))
        return bool(late)
