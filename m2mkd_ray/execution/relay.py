"""An actor that carries progress from rank 0 of a Ray Train job to the stage that started it.

A file of its own, free of torch: the actor's process imports the file that its class
is in, and the stage's would cost it seconds and most of a gigabyte.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import ray

from m2mkd_ray.errors import M2mkdError
from m2mkd_ray.execution.cohort import Withdrawn
from m2mkd_ray.execution.context import StageContext

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 30.0

Said = tuple[int, int, Mapping[str, float], Sequence[Mapping[str, float]]]
"""What rank 0 says: step, steps in all, metrics, and all landmarks so far."""


class Relay:
    """Keeps what rank 0 said last, and an expected error that any rank met."""

    def __init__(self) -> None:
        self.last: Said | None = None
        self.error: M2mkdError | None = None

    def fail(self, error: M2mkdError) -> None:
        """Keep the first error that a rank met."""
        self.error = self.error or error

    def failure(self) -> M2mkdError | None:
        """The error that was kept."""
        return self.error

    def put(
        self, step: int, total_steps: int, metrics: Mapping[str, float], landmarks: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """Keep it in the place of what was there."""
        self.last = (step, total_steps, metrics, landmarks)

    def get(self) -> Said | None:
        """What rank 0 said last, once."""
        last, self.last = self.last, None
        return last


@contextmanager
def relay(context: StageContext, every_s: float = 2.0) -> Iterator["ActorHandle"]:
    """An actor whose `put` reaches `context.report` within `every_s`, and at the latest when the block ends.

    It comes back if its node dies. What goes wrong with a report is logged: progress is not worth a training.
    """
    actor = cast("ActorHandle", ray.remote(num_cpus=0, max_restarts=-1)(Relay).remote())
    over = threading.Event()

    def carry() -> None:
        is_told = False
        while not over.wait(every_s):
            is_told = _carry_once(actor, context, is_told)
        _carry_once(actor, context, is_told)

    carrier = threading.Thread(target=carry, name="relay", daemon=True)
    carrier.start()
    try:
        yield actor
    finally:
        over.set()
        carrier.join()
        ray.kill(actor)


def _carry_once(actor: "ActorHandle", context: StageContext, is_told: bool) -> bool:
    """Pass on what there is to pass on; whether a failure was told of, and no report has come through since."""
    try:
        said = cast("Said | None", ray.get(actor.get.remote(), timeout=_ANSWER_TIMEOUT_S))
        if said is None:
            return is_told
        context.report(*said)
        return False
    except Withdrawn:
        return is_told  # the ranks run on until the executor ends this stage's worker
    except Exception:
        if not is_told:
            logger.warning("The ranks' progress is not known for now", exc_info=True)
        return True
