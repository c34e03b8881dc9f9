"""What a running stage sees of the world."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel

from m2mkd_ray.execution.stage import Metrics, Resources


class Checkpoints(Protocol):
    """Where a stage keeps what it needs to go on after a kill.

    A checkpoint is a folder of files at a step. It appears whole or not at all,
    is checked against its hashes before it is given back, and outlives worker,
    node and driver.
    """

    def latest(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint as (step, local folder to read), or None."""

    def scratch(self) -> Path:
        """A new empty local folder for the files of the next checkpoint; what a killed process left in one is removed
        when its stage is started again."""

    def save(self, step: int, files: Path) -> None:
        """Keep the folder `files` (moved or copied) as the checkpoint of `step`; older ones go."""


Arrays = tuple[np.ndarray, ...]
Maker = Callable[[], Callable[[int], Arrays]]
"""Called once in the process that makes arrays; gives a pure function of the step. Small and picklable."""


@dataclass(frozen=True)
class Made:
    """The arrays of a step."""

    arrays: Arrays
    """Read only."""
    is_own: bool
    """Whether this worker made them itself, rather than taking what was made once for its node."""
    is_first: bool = False
    """Whether it is the first to take what was made for its node, so that it alone accounts for the making."""

    def __post_init__(self) -> None:
        for array in self.arrays:
            array.flags.writeable = False


class StageContext(Protocol):
    """The only door between a stage and the rest."""

    inputs: Mapping[str, Path]
    """Local folder with the artifacts of each need, by role; read only."""
    input_metrics: Mapping[str, Metrics]
    """What each need returned, by role."""
    input_manifests: Mapping[str, Mapping[str, Any]]
    """The manifest of each need, by role: times, place, attempts, files, versions."""
    out: Path
    """Empty local folder; what is in it when `run` returns becomes the artifact."""
    checkpoints: Checkpoints
    durable: str
    """Path or URI, reachable from every node, below which a library may keep checkpoints of its own (Ray Train
    does); outlives worker, node and driver, and goes when the stage is complete."""
    resources: Resources
    placement: BaseModel

    is_shared: bool
    """Whether other workers on this node may read the same streams."""

    def stream(self, key: str, maker: Maker, start: int, stop: int, workers: int = 0) -> Iterator[Made]:
        """`maker()(step)` for the steps `start` to `stop` (exclusive), in order.

        Made once a node for all workers that ask for the same `key`, where there are several (`is_shared`). Who
        falls too far behind makes its own, and so does everyone whose node has nobody to share with: what comes
        out is the same.

        Args:
            workers: processes that make steps at the same time for the whole node, if more than one; without effect
                where this worker makes its own.
        """

    def elsewhere(self) -> Callable[[], "StageContext"]:
        """This stage's context in another process, on any node: what comes back is small and picklable, and gives it
        when it is called there. Inputs, checkpoints and placement are the same; what is left below its `out` goes
        with it."""

    def has_notice(self) -> bool:
        """Whether this worker's node is about to be taken away: time for a last checkpoint, then `PreemptedError`.
        Cheap, throttled."""

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], landmarks: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """Say how far the stage is, with what it measures; becomes `progress.json`. Cheap, throttled.

        Args:
            landmarks: finite values that nobody who watches may miss, as the accuracy after every epoch: all so far,
                each time. A report with a new one is always written.

        Raises:
            Withdrawn: the stage is not wanted any more. Its checkpoints are kept; a member of a cohort lets it end
                that member alone.
        """
