"""What the driver of a sweep knows of a stage, from what the executor tells and what the store keeps."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from m2mkd_ray.execution import (
    Event,
    Progress,
    Resources,
    Stage,
    StageEnded,
    StageFailed,
    StageInterrupted,
    StageProgress,
    StageRetried,
    StageReused,
    StageSkipped,
    StageStarted,
    StageWithdrawn,
    Store,
)
from m2mkd_ray.execution.held import Held
from m2mkd_ray.preflight import holds
from m2mkd_ray.sweeps.results import COUNTED, StageRecord

Worker = tuple[Any, ...]
"""Actor, host and process."""


@dataclass
class Watched:
    """A stage of a sweep."""

    stage: Stage
    state: Literal["waiting", "running", "complete", "stopped", "failed"] = "waiting"
    progress: Progress | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What it returned; empty while it is not complete."""
    started: float | None = None
    ended: float | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    grief: str = ""
    """What it failed of."""

    def look(self, store: Store) -> None:
        """Take in what the store has of it."""
        status = store.status(self.stage.address)
        if status.state == "complete":
            self._complete(store)
        elif status.progress is not None:
            self.progress = status.progress

    def hear(self, event: Event, store: Store) -> None:
        """Take an event in."""
        match event:
            case StageReused() | StageEnded():
                self._complete(store)
            case StageStarted(where=where):
                self.state, self.where, self.ended, self.grief = "running", where, None, ""
                self.started = self.started or time.time()
            case StageProgress(progress=progress):
                self.progress = progress
            case StageRetried() | StageInterrupted():
                self.state = "waiting"
            case StageWithdrawn():
                self.state, self.ended = "stopped", time.time()
                self.progress = store.progress(self.stage.address) or self.progress
            case StageFailed(message=message):
                self.state, self.ended, self.grief = "failed", time.time(), message
            case StageSkipped(because=because):
                names = ", ".join(stage.name for stage in because)
                self.state, self.grief = "failed", f"{self.stage.name} was not run: it needs {names}, which failed"

    @property
    def is_complete(self) -> bool:
        """Whether its artifact is there."""
        return self.state == "complete"

    @property
    def seed(self) -> int:
        """Of its training, or its own."""
        config: Any = self.stage.config
        return int(getattr(getattr(config, "training", config), "seed", 0))

    @property
    def worker(self) -> Worker:
        """Which process runs it, or ran it last; empty if none did."""
        return tuple(self.where.get(name) for name in ("actor_id", "host", "pid")) if self.where else ()

    def values(self, metric: str, epochs: float) -> list[tuple[float, float]]:
        """Epoch and value, in order, without the end's before it is complete.

        Args:
            epochs: where the end is, if the stage does not say.
        """
        step, total = (self.progress.step, self.progress.total_steps) if self.progress else (0, 0)
        found = {
            mark["epoch"]: mark[metric] for mark in self._marks() if metric in mark and mark["step"] < max(total, step)
        }
        if self.is_complete and metric in self.metrics:
            marks = self._marks()
            found[marks[-1]["epoch"] if marks else epochs] = float(self.metrics[metric])
        return sorted(found.items())

    def record(self, seed: int, metric: str, epochs: float, *, reused: bool) -> StageRecord:
        """It as results have it."""
        marks = self._marks()
        counted = self.metrics if self.is_complete else marks[-1] if marks else {}
        step, total = (self.progress.step, self.progress.total_steps) if self.progress else (0, 0)
        training = getattr(self.stage.config, "training", None)  # evaluations have none
        batch, whole = (training.feed.batch_size, training.train.epochs) if training else (0, 0.0)
        return StageRecord(
            name=self.stage.name,
            address=self.stage.address,
            seed=seed,
            state=self.state,
            reused=reused,
            epochs=whole * step / total if total else whole * self.is_complete,
            images=step * batch,
            counted_images=batch * (step if self.is_complete else counted.get("counted_steps", 0)),
            history=tuple(self.values(metric, epochs)),
            started=self.started,
            ended=self.ended,
            worker=f"{self.where['host']} (pid {self.where['pid']})" if self.where else "",
            counters={name: float(counted[name]) for name in COUNTED if name in counted},
        )

    def _marks(self) -> list[Mapping[str, float]]:
        return list(self.progress.landmarks) if self.progress else []

    def _complete(self, store: Store) -> None:
        manifest = store.manifest(self.stage.address)
        self.state, self.grief = "complete", ""
        self.metrics, self.where = manifest["metrics"], manifest["where"]
        if manifest.get("progress"):
            self.progress = Progress(**manifest["progress"])
        self.started = self.started or datetime.fromisoformat(manifest["started"]).timestamp()
        self.ended = datetime.fromisoformat(manifest["ended"]).timestamp()


class GpuTime:
    """What stages have held of GPUs, from what the executor tells of them. Ranks count from their first report on, as
    in the report of a run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, of any origin."""
        self._held = Held(clock, holds)
        self._seconds = 0.0

    def hear(self, event: Event) -> None:
        """Take an event in."""
        self._look()
        self._held.hear(event)

    @property
    def seconds(self) -> float:
        """GPUs times the seconds for which they were held, with those of workers at work."""
        self._look()
        return self._seconds

    def _look(self) -> None:
        self._seconds += 3600 * sum(hours for name, _, hours in self._held.look() if name == "gpu_hours")


def ranks_held(stage: Stage) -> tuple[Resources, ...]:
    """What the ranks of a stage hold, each; empty where it starts none."""
    return holds(stage)[1:]
