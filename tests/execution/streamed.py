"""What streams are made of in tests, and who reads them; Ray's workers import it too."""

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray

from m2mkd_ray.execution.context import Arrays
from m2mkd_ray.execution.sharing import Hub, shared_stream

FLOATS = 50_000


@dataclass(frozen=True)
class Maker:
    """Makes 200 kB and the step's number, and leaves a file for every call."""

    folder: Path
    sleep_s: float = 0.0
    hangs_at: int = -1
    """The first call for this step does not come back."""
    raises_at: int = -1

    def __call__(self) -> Callable[[int], Arrays]:
        return self.make

    def make(self, step: int) -> Arrays:
        calls = len(self.calls(step))
        (self.folder / f"{step}-{os.getpid()}-{uuid.uuid4().hex}").touch()
        time.sleep(1000 if step == self.hangs_at and not calls else self.sleep_s)
        if step == self.raises_at:
            raise ValueError(f"step {step} is unlucky")
        return np.random.default_rng(step).random(FLOATS, dtype=np.float32), np.array([step])

    def calls(self, step: int | str = "*") -> list[Path]:
        """A file for every call for that step, or for any."""
        return list(self.folder.glob(f"{step}-*"))


class Read(NamedTuple):
    """A step as a reader got it."""

    step: int
    digest: str
    is_own: bool
    is_copy: bool
    is_writeable: bool
    at: float


def digest(arrays: Arrays) -> str:
    """Of all bytes."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


class Reader:
    """An actor that reads a stream."""

    def __init__(self) -> None:
        self.step = -1

    def read(
        self, hub: Hub, maker: Maker, start: int, stop: int, sleeps: Mapping[int, float], each_s: float = 0.0
    ) -> list[Read]:
        node = ray.get_runtime_context().get_node_id()
        seen = []
        for step, made in enumerate(shared_stream(hub, node, "key", maker, start, stop, "reader"), start):
            flags = made.arrays[0].flags
            seen.append(Read(step, digest(made.arrays), made.is_own, flags.owndata, flags.writeable, time.time()))
            self.step = step
            time.sleep(sleeps.get(step, each_s))
        return seen

    def at(self) -> int:
        """The last step that was read."""
        return self.step

    def start_anew(self) -> None:
        """Nothing was read."""
        self.step = -1
