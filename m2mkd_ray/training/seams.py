"""What the training loop asks of the places around it: batches, checkpoints, somebody to report to."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

Point = dict[str, float]
"""One row of a history: step, epoch, lr, what the objective logs, and counters (`m2mkd_ray.training.counters`)."""


class Batch(Protocol):
    """This rank's part of a batch."""

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W)."""

    @property
    def targets(self) -> Tensor:
        """(B, K), each row adds up to 1."""


class Feed(Protocol):
    """The batches of a training, as a function of the step.

    One that counts what it does has `counts`, numbers by name that only grow; they go into the history.
    """

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""

    def loader(self, start: int, stop: int, *, num_workers: int = 0, pin_memory: bool = False) -> Iterable[Batch]:
        """The batches of steps `start` to `stop`, in order."""


class Checkpoints(Protocol):
    """Where a training keeps its state; a folder a checkpoint."""

    def latest(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint as (step, folder), or None."""

    def scratch(self) -> Path:
        """A new empty folder for the files of the next checkpoint. Whoever keeps them cleans up after a kill."""

    def save(self, step: int, files: Path) -> None:
        """Keep `files` as the checkpoint of `step`.

        Where several ranks train one model every rank calls this with the files of its own, which may be none.
        With one rank it may be called from another thread, while the training goes on.
        """


class Session(Protocol):
    """What the loop needs of the place that it runs in."""

    @property
    def checkpoints(self) -> Checkpoints:
        """Where state is kept."""

    def has_notice(self) -> bool:
        """Whether the machine is about to be taken away. Asked after every step; of several ranks, by all of them
        after the steps that are logged, and each is told the same."""

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], landmarks: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """How far the training is, and what of it nobody who watches may miss: all so far, each time.

        What is raised here ends this training alone.
        """
