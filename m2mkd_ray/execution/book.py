"""Where it is written down, and told, how stages and their attempts ended."""

from collections.abc import Callable

from m2mkd_ray.execution.events import Event
from m2mkd_ray.execution.locks import Locks
from m2mkd_ray.execution.runs import Run, State
from m2mkd_ray.execution.store import Store


class Book:
    """What the parts of an executor have to say of stages."""

    def __init__(self, store: Store, locks: Locks, tell: Callable[[Event], None]) -> None:
        self._store = store
        self._locks = locks
        self.tell = tell

    def end(self, run: Run, state: State, event: Event) -> None:
        """A stage has come to an end."""
        run.state, run.end = state, event
        self.tell(event)

    def end_attempt(self, run: Run, outcome: str, message: str = "") -> None:
        """Say how an attempt ended, unless another driver took its stage over: the open attempt is that one's."""
        if self._locks.holds(run.stage.address):
            run.lost_steps += self._store.end_attempt(run.stage.address, outcome, message)

    def wait_no_longer(self, run: Run) -> None:
        """A stage that no node could hold has found one, or needs none."""
        if run.lacks_since is not None:
            run.lacks_since = None
            self._store.say_waits(run.stage.address, "")
