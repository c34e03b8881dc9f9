"""An actor that makes the arrays of each step once, for all workers of its node that read the same stream.

It holds a window of steps in the node's object store: a step is put there once and
mapped by every reader, without a copy. It makes ahead as long as the window has
room. Room comes from steps that every consumer has taken, so the fastest consumer is
never more than a window ahead of the slowest. One that asks for nothing, though
others wait for room, is let go after `patience_s`: it may be dead, and if it comes
back, it makes its own until it finds a window that has its step.

All state is changed in the actor's event loop; only making is done in a thread, so
there are no locks. The consumer's side and the hub, which starts and ends these
actors, are in `sharing.py`.
"""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import ray
import ray.cloudpickle
from pydantic import BaseModel, Field

Arrays = tuple[np.ndarray, ...]

_MIN_STEPS = 4
"""Held whatever their size; with fewer, a maker and its consumers would wait for each other in turns."""
_REACH = 16
"""Steps by which a new consumer may be off the window. All consumers of a stream that died come back within it."""
_TICK_S = 0.5


class Sharing(BaseModel, frozen=True, extra="forbid"):
    """How workers of a node share what is made; changes only speed and memory, never what is made."""

    window_bytes: int = Field(96_000_000, gt=0)
    """Made arrays that a stream holds in the object store (at least 4 steps); each consumer adds what it has in
    hand: up to `prefetch` steps and the one it works on."""
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
    cpus: float = Field(0.0, ge=0)
    """CPU cores that a stream reserves; 0 starts on a node that is full, as the workers' own loading would."""


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
    """CPU seconds of making, of the thread that does it."""
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


class Stream:
    """The actor. `maker` is pickled, so that threads are set before it imports anything."""

    def __init__(self, maker: bytes, sharing: Sharing) -> None:
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._pickled, self._sharing = maker, sharing
        self._make: Callable[[int], Arrays] | None = None
        self._consumers: dict[str, _Consumer] = {}
        self._made: dict[int, _Step] = {}
        self._failed: dict[int, str] = {}
        self._low: int | None = None
        """No step before it is made (any more); None as long as nobody has joined."""
        self._first = 0
        self._gathers_until = 0.0
        self._counts = Counts()
        self._cpu_s = 0.0
        self._step_bytes = 0
        self._changed = asyncio.Condition()
        self._thread = ThreadPoolExecutor(1)
        self._work: asyncio.Task | None = None

    async def join(self, consumer: str, start: int, stop: int) -> bool:
        """Whether the window has the step `start`, or will have it soon; if so, the consumer is waited for."""
        if self._low is None:
            self._low = self._first = start
            self._gathers_until = time.monotonic() + self._sharing.gather_s
            self._work = asyncio.create_task(self._make_ahead())
        if self._is_gathering and self._low - _REACH <= start:
            self._low = min(self._low, start)
        if not self._low <= start <= self._end + _REACH:
            return False
        self._consumers[consumer] = _Consumer(start, stop)
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
            reply = Reply(self._made[step].arrays)
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
        return self._counts + Counts(cpu_s=self._cpu_s)

    async def idle_s(self) -> float:
        """Seconds since anybody asked for anything."""
        consumers = self._consumers.values()
        if any(consumer.waiting for consumer in consumers):
            return 0.0
        return time.monotonic() - max((consumer.asked for consumer in consumers), default=0.0)

    async def pid(self) -> int:
        """Its process."""
        return os.getpid()

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
        loop = asyncio.get_running_loop()
        while True:
            step = self._next()
            if step is None:
                await self._wait()
                continue
            try:
                made = await loop.run_in_executor(self._thread, self._put, step)
            except Exception as error:  # the consumer makes the step itself, and raises it where it is read
                self._failed[step] = f"{type(error).__name__}: {error}"
            else:
                self._made[step], self._step_bytes = made, made.bytes
                self._counts += Counts(made=1, peak_bytes=self._held)
            await self._say()

    async def _wait(self) -> None:
        """Until something changes, or the time has come to look who is late."""
        try:
            async with asyncio.timeout(_TICK_S), self._changed:
                await self._changed.wait()
        except TimeoutError:
            return

    def _put(self, step: int) -> _Step:
        began = time.thread_time()
        if self._make is None:
            self._make = ray.cloudpickle.loads(self._pickled)()
        arrays = tuple(np.ascontiguousarray(array) for array in self._make(step))
        self._cpu_s += time.thread_time() - began
        return _Step(ray.put(arrays), sum(array.nbytes for array in arrays))

    @property
    def _held(self) -> int:
        return sum(step.bytes for step in self._made.values())

    def _next(self) -> int | None:
        """The step to make now, after room was made for it; None if there is none, or no room."""
        if not self._consumers:
            return None
        slowest = min(consumer.position for consumer in self._consumers.values())
        stop = max(consumer.stop for consumer in self._consumers.values())
        step = next((step for step in range(slowest, stop) if not self._is_done(step)), None)
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
        return len(self._made) < _MIN_STEPS or self._held + self._step_bytes <= self._sharing.window_bytes

    def _drop_before(self, slowest: int) -> None:
        """Drop steps that all have taken, oldest first, until there is room."""
        for step in sorted(self._made):
            if self._has_room or step >= slowest or self._is_held(step):
                break
            del self._made[step]
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
