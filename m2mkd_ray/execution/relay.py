"""An actor that carries progress from rank 0 of a Ray Train job to the stage that started it.

A file of its own, free of torch: the actor's process imports the file that its class
is in, and the stage's would cost it seconds and most of a gigabyte.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import ray

from m2mkd_ray.execution.context import StageContext

if TYPE_CHECKING:
    from ray.actor import ActorHandle

Said = tuple[int, int, Mapping[str, float]]
"""What rank 0 says: step, steps in all, metrics."""


class Relay:
    """Keeps what rank 0 said last."""

    def __init__(self) -> None:
        self.last: Said | None = None

    def put(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Keep it in the place of what was there."""
        self.last = (step, total_steps, metrics)

    def get(self) -> Said | None:
        """What rank 0 said last, once."""
        last, self.last = self.last, None
        return last


@contextmanager
def relay(context: StageContext, every_s: float = 2.0) -> Iterator["ActorHandle"]:
    """An actor whose `put` reaches `context.report` within `every_s`, for as long as the block runs."""
    actor = cast("ActorHandle", ray.remote(num_cpus=0)(Relay).remote())
    over = threading.Event()

    def carry() -> None:
        while not over.wait(every_s):
            said = cast("Said | None", ray.get(actor.get.remote()))
            if said is not None:
                context.report(*said)

    carrier = threading.Thread(target=carry, name="relay", daemon=True)
    carrier.start()
    try:
        yield actor
    finally:
        over.set()
        carrier.join()
        ray.kill(actor)
