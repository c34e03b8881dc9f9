"""Ray Tune's side of a trial: an actor that trains nothing and waits for the values of its stages.

Free of torch, because there is a process of it for every trial under way. What it is to
report comes from the driver through the *board*, an actor that keeps a message for each
trial until it is fetched. So a trial's process may die, or be used for the next trial,
and its stages know nothing of it.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray import tune

from m2mkd_ray.errors import TrainingError

SWEEP = "sweep"
"""In a trial's config: what its board is called after."""
POINT = "point"
"""In a trial's config: values by path, as they were drawn."""


@dataclass(frozen=True)
class Value:
    """What a trial is to report."""

    metric: str
    value: float
    epoch: float
    is_last: bool


@dataclass(frozen=True)
class Grief:
    """What a trial failed of."""

    message: str


@dataclass(frozen=True)
class Over:
    """The sweep has ended; nobody reads what is reported any more."""


Message = Value | Grief | Over


def board_of(sweep: str) -> str:
    """The name of a sweep's board among the actors of its driver."""
    return f"m2mkd-board-{sweep}"


class Board:
    """A message for each trial at most, which the driver puts there and the trial's actor takes."""

    def __init__(self) -> None:
        self._messages: dict[str, Message] = {}
        self._takers: dict[str, str] = {}
        self._has_changed = asyncio.Event()

    async def put(self, trial: str, message: Message) -> None:
        """Leave a message, in the place of one that was not taken."""
        self._messages[trial] = message
        self._tell()

    async def take(self, trial: str, taker: str) -> Message | None:
        """The message for a trial, when it is there; None if another actor has taken the trial over."""
        self._takers[trial] = taker
        self._tell()
        while self._takers[trial] == taker:
            if trial in self._messages:
                return self._messages.pop(trial)
            await self._has_changed.wait()
        return None

    def _tell(self) -> None:
        self._has_changed.set()
        self._has_changed = asyncio.Event()


class Trial(tune.Trainable):
    """Reports what it finds on the board."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Next to nothing, as cores and GPUs are its stages'; Tune wants something, so a byte of memory."""
        return tune.PlacementGroupFactory([{"memory": 1}])

    def setup(self, config: dict[str, Any]) -> None:
        """Find the board."""
        self._board = ray.get_actor(board_of(config[SWEEP]))

    def step(self) -> dict[str, Any]:
        """Wait for the next value.

        Raises:
            TrainingError: the trial's stages failed.
        """
        me = ray.get_runtime_context().get_actor_id()
        message = cast("Message | None", ray.get(self._board.take.remote(self.trial_id, me)))
        if isinstance(message, Grief):
            raise TrainingError(message.message)
        if message is None:
            raise RuntimeError(f"Trial {self.trial_id} was taken over by another actor.")
        if isinstance(message, Over):
            return {"done": True}
        return {message.metric: message.value, "epoch": message.epoch, "done": message.is_last}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Nothing of a trial is kept here, so the next one may follow."""
        return True
