"""What workers and executor report, as metrics of Ray, which every node offers to Prometheus.

Names, help texts and units are in one table, `METRICS`; docs/operations.md has it
too, and a test compares them. Ray puts `ray_` before each name and `_total` behind a
counter's. A worker exports every ten seconds, so what it counted in its last seconds
may be missing when it is killed: metrics are for watching, the histories in the store
are the record.

Turned down: a port of our own for each worker (Prometheus would have to find it; Ray's
node agents are found already), and `address` alone as a label (a dashboard wants names).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ray.util import metrics as of_ray

from m2mkd_ray.execution.ahead import of_worker
from m2mkd_ray.execution.events import (
    Event,
    StageEnded,
    StageFailed,
    StageInterrupted,
    StageRetried,
    StageReused,
    StageSkipped,
    StageStarted,
    StageWithdrawn,
)
from m2mkd_ray.execution.held import UNNAMED, Held, Tags
from m2mkd_ray.execution.stage import Resources, Stage, in_order

_OF_STAGE = ("stage", "recipe", "address")
_OF_GROUP = ("group", "spot")
PREFIX = "m2mkd_"


@dataclass(frozen=True)
class Metric:
    """A metric, as Prometheus and its readers know it."""

    name: str
    """Without the prefix; of what a training reports, its name there."""
    kind: Literal["gauge", "counter"]
    """gauge: the last value. counter: the sum since its process began, from values since the last report."""
    unit: str
    help: str
    tags: tuple[str, ...] = _OF_STAGE
    reported: bool = True
    """Whether a stage reports it; others come from the executor."""

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("step", "gauge", "steps", "Optimizer steps that are done"),
        Metric("total_steps", "gauge", "steps", "Optimizer steps in all"),
        Metric("loss", "gauge", "nats", "Training loss"),
        Metric("lr", "gauge", "1", "Learning rate"),
        Metric("val_top1", "gauge", "share", "Accuracy on the validation rows"),
        Metric("images_per_s", "gauge", "images/s", "Images trained on a second"),
        Metric("data_wait", "gauge", "share", "Share of the time spent waiting for data"),
        Metric("mfu", "gauge", "share", "Model FLOPs utilisation, where the device's peak is known"),
        Metric("peak_memory_gb", "gauge", "GB", "Most memory of the device that was allocated"),
        Metric("train_s", "counter", "s", "Time in training, without validations and checkpoints"),
        Metric("prefix_s", "counter", "s", "Time in the frozen meta modules before the pair"),
        Metric("teacher_s", "counter", "s", "Time in the teacher hybrid"),
        Metric("student_s", "counter", "s", "Time in the student module, forward and backward"),
        Metric("suffix_s", "counter", "s", "Time in the frozen meta modules after the student"),
        Metric("teacher_calls", "counter", "images", "Images that went through the teacher"),
        Metric("cache_hits", "counter", "images", "Images whose teacher logits were read from the cache"),
        Metric("decodes", "counter", "images", "Images that this process decoded, or its node's feed for it first"),
        Metric("own_batches", "counter", "batches", "Batches that a worker made itself, beside its node's feed"),
        Metric("flops", "counter", "FLOP", "Floating-point operations of the models"),
        Metric("stages", "gauge", "stages", "Stages of the plan by state", ("recipe", "state"), reported=False),
        Metric("retries", "counter", "attempts", "Attempts that failed and were tried again, by kind of failure",
               ("recipe", "kind"), reported=False),
        Metric("waiting_s", "counter", "s", "Time from all needs being complete to a worker taking the stage up",
               reported=False),
        Metric("cohorts", "gauge", "workers", "Workers at work, by how many stages each runs", ("size",),
               reported=False),
        Metric("node_hours", "counter", "h", "Time of nodes on which a stage was at work", _OF_GROUP, reported=False),
        Metric("gpu_hours", "counter", "h", "Time of GPUs that workers and ranks held", _OF_GROUP, reported=False),
        Metric("cpu_hours", "counter", "h", "Time of CPU cores that workers and ranks held", _OF_GROUP,
               reported=False),
        Metric("lost_steps", "counter", "steps", "Optimizer steps that no checkpoint held when an attempt ended",
               _OF_GROUP, reported=False),
    )
}  # fmt: skip
"""Every metric, by its name without the prefix."""

STATES = ("waiting", "running", "complete", "reused", "failed", "skipped", "withdrawn")
"""Values of the tag `state`; a stage that will be tried again is waiting."""

_AFTER: Mapping[type[Event], str] = {
    StageReused: "reused",
    StageStarted: "running",
    StageEnded: "complete",
    StageRetried: "waiting",
    StageInterrupted: "waiting",
    StageFailed: "failed",
    StageSkipped: "skipped",
    StageWithdrawn: "withdrawn",
}
"""State of a stage after an event."""


def report_metrics(
    stage: str, recipe: str, address: str, step: int, total_steps: int, metrics: Mapping[str, float]
) -> None:
    """Pass on what a stage reported; for every report, in a worker of Ray's.

    Values whose names are not in `METRICS` are left out, and so are counts of 0 or less, which Ray refuses.
    """
    tags = {"stage": stage, "recipe": recipe, "address": address}
    for name, value in {**metrics, "step": step, "total_steps": total_steps}.items():
        metric = METRICS.get(name)
        if metric is not None and metric.reported:
            _record(_instrument(name), float(value), tags)


class ExecutorMetrics:
    """What the executor tells, as metrics; give it to `execute` as `on_event`, after Ray has started.

    Args:
        plan: the stages, and those that they need, that are waiting at the beginning.
        holds: all that a stage holds while it runs, its worker's share first.
        clock: seconds, of any origin.
    """

    def __init__(
        self,
        plan: Iterable[Stage],
        holds: Callable[[Stage], Sequence[Resources]] = of_worker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._held = Held(clock, holds)
        self._states: dict[str, str] = {}
        self._recipes: dict[str, str] = {}
        self._below: dict[str, list[Stage]] = {}
        stages = self._meet(plan)
        self._ready: dict[str, float] = {}
        """When each waiting stage could have started, as far as its needs go."""
        self._sizes: set[int] = set()
        # Not shared with another run of this process: Ray may have been started anew between.
        self._instruments = {name: _make(name) for name, metric in METRICS.items() if not metric.reported}
        for stage in stages:
            self._look(stage)
        self._show()

    def _meet(self, plan: Iterable[Stage]) -> list[Stage]:
        """Take up stages that are not known yet, and what they read; they wait."""
        new = [stage for stage in in_order(plan) if stage.address not in self._states]
        for stage in new:
            self._states[stage.address], self._recipes[stage.address] = "waiting", stage.of
            self._below[stage.address] = []
            for read in stage.reads.values():
                self._below[read.address].append(stage)
        return new

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        for name, at, hours in self._held.look():
            _record(self._instruments[name], hours, dict(zip(_OF_GROUP, at)))
        left = self._held.hear(event)
        state = _AFTER.get(type(event))
        if state is None:
            return  # no stage is in another state after it
        stage, now = event.stage, self._clock()
        for new in self._meet([stage]) if stage.address not in self._states else ():  # added to an open run
            self._look(new)
        ready = self._ready.pop(stage.address, now)
        self._enter(stage, state)
        self._count_lost(event, left)
        match event:
            case StageStarted():
                tags = {"stage": stage.name, "recipe": stage.of, "address": stage.address}
                _record(self._instruments["waiting_s"], now - ready, tags)
            case StageRetried(kind=kind, delay_s=delay_s):
                _record(self._instruments["retries"], 1.0, {"recipe": stage.of, "kind": str(kind)})
                self._ready[stage.address] = now + delay_s
            case StageInterrupted():
                self._ready[stage.address] = now
        self._show()

    def by_state(self) -> Mapping[tuple[str, str], int]:
        """How many stages there are, by recipe and state."""
        return Counter((self._recipes[address], state) for address, state in self._states.items())

    def by_cohort_size(self) -> Mapping[int, int]:
        """How many workers are at work, by the number of stages that each runs."""
        return self._held.sizes()

    def _count_lost(self, event: Event, where: Tags | None) -> None:
        lost = float(getattr(event, "lost_steps", 0))
        _record(self._instruments["lost_steps"], lost, dict(zip(_OF_GROUP, where or (UNNAMED, "false"))))

    def _enter(self, stage: Stage, state: str) -> None:
        self._states[stage.address] = state
        if state in ("complete", "reused"):
            for below in self._below[stage.address]:
                self._look(below)

    def _look(self, stage: Stage) -> None:
        """Note down from when on a stage could run."""
        reads = (self._states[read.address] for read in stage.reads.values())
        if self._states[stage.address] == "waiting" and all(state in ("complete", "reused") for state in reads):
            self._ready.setdefault(stage.address, self._clock())

    def _show(self) -> None:
        counts = self.by_state()
        for recipe in dict.fromkeys(self._recipes.values()):
            for state in STATES:
                tags = {"recipe": recipe, "state": state}
                _record(self._instruments["stages"], counts.get((recipe, state), 0), tags)
        sizes = self.by_cohort_size()
        self._sizes |= sizes.keys()
        for size in self._sizes:  # those that are no more are 0, not what they were
            _record(self._instruments["cohorts"], sizes.get(size, 0), {"size": str(size)})


Instrument = of_ray.Gauge | of_ray.Counter


def _make(name: str) -> Instrument:
    metric = METRICS[name]
    kind = of_ray.Gauge if metric.kind == "gauge" else of_ray.Counter
    return kind(f"{PREFIX}{name}", description=f"{metric.help} ({metric.unit})", tag_keys=metric.tags)


_instrument = cache(_make)


def _record(instrument: Instrument, value: float, tags: Mapping[str, str]) -> None:
    if isinstance(instrument, of_ray.Gauge):
        instrument.set(value, dict(tags))
    elif value > 0:
        instrument.inc(value, dict(tags))
