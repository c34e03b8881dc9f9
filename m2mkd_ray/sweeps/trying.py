"""A point being tried: how far it is, what it is worth, and what Tune has heard of that."""

from collections.abc import Mapping, Sequence
from typing import Any

from m2mkd_ray.errors import TrainingError
from m2mkd_ray.recipe import Recipe
from m2mkd_ray.sweeps import points
from m2mkd_ray.sweeps.points import Point
from m2mkd_ray.sweeps.results import StageRecord, TrialRecord, TrialState
from m2mkd_ray.sweeps.sweep import Sweep
from m2mkd_ray.sweeps.watched import Watched

Score = tuple[float, float, Mapping[int, float]]
"""Epoch, value, and the value of each seed."""

_SAME = 1e-9
"""Epochs that are so close are one."""


class Trying:
    """A trial of a sweep that has begun, now or in an earlier run.

    Args:
        name: Tune's id.
        order: its number among the trials.
    """

    def __init__(self, sweep: Sweep, base: Recipe, name: str, point: Point, order: int) -> None:
        self._sweep, self._metric, self._epochs = sweep, points.metric_of(sweep), points.epochs_of(sweep, base)
        self.name, self.point, self.order = name, point, order
        self.state: TrialState = "waiting"
        self.history: list[tuple[float, float]] = []
        """Epoch and value, of which Tune has heard."""
        self.by_seed: Mapping[int, float] = {}
        self.started: float | None = None
        self.ended: float | None = None
        self.why = self.grief = ""
        """`grief`: what one of its stages failed of."""
        self.is_live = False
        """Whether an actor of Tune's waits for its values."""
        self.was_ended = False
        """Whether an earlier run ended it, of which Tune has yet to be told."""
        self.targets: Mapping[int, Sequence[Watched]] = {}
        """What is measured, by seed; empty before it is planned."""
        self.recorded: Sequence[tuple[int, Watched, bool]] = ()
        """What it accounts for: seed, stage, and whether that was somebody else's before."""
        self.recorded_before: Sequence[StageRecord] = ()
        """What an earlier run wrote down of these."""
        self.wants: frozenset[str] = frozenset()
        """Addresses of all its stages."""

    @classmethod
    def from_record(cls, sweep: Sweep, base: Recipe, record: TrialRecord, order: int) -> "Trying":
        """A trial of an earlier run, as that left it."""
        trial = cls(sweep, base, record.name, record.point, order)
        trial.state, trial.history, trial.by_seed = record.state, list(record.history), record.by_seed
        trial.started, trial.ended, trial.why = record.started, record.ended, record.why
        trial.recorded_before = record.stages
        trial.was_ended = record.state in ("complete", "stopped") and bool(record.history)
        return trial

    def record(self) -> TrialRecord:
        """It as results have it."""
        stages = tuple(
            watched.record(seed, self._metric, self._epochs, reused=reused) for seed, watched, reused in self.recorded
        )
        has_begun = not self.recorded or any(watched.started for _, watched, _ in self.recorded)
        return TrialRecord(
            name=self.name,
            point=self.point,
            state="waiting" if self.state == "running" and not has_begun else self.state,
            history=tuple(self.history),
            by_seed=self.by_seed,
            stages=stages or tuple(self.recorded_before),
            started=self.started,
            ended=self.ended,
            why=self.why,
        )

    @property
    def watched(self) -> list[Watched]:
        """Its targets, of all seeds."""
        return [target for of_seed in self.targets.values() for target in of_seed]

    @property
    def is_complete(self) -> bool:
        """Whether all its targets are."""
        return all(target.is_complete for target in self.watched)

    @property
    def is_at_work(self) -> bool:
        """Whether its stages are to be run for Tune."""
        return self.is_live and not self.was_ended

    def is_mate_of(self, other: "Trying") -> bool:
        """Whether both run in the same worker, or neither runs yet."""
        mine, theirs = self._workers, other._workers
        return bool(mine & theirs) or not (mine or theirs)

    def has_come_to(self, epoch: float) -> bool:
        """Whether it has a value at an epoch, or will have none after what it has."""
        if all(target.is_complete or target.grief for target in self.watched):
            return True
        scores = self.scores()
        return bool(scores) and scores[-1][0] >= epoch - _SAME

    @property
    def next(self) -> Score | None:
        """The first value that Tune has not heard of; at the end the last one in any case."""
        scores = self.scores()
        new = [score for score in scores if not self.history or score[0] > self.history[-1][0] + _SAME]
        if new:
            return new[0]
        return scores[-1] if scores and self.is_complete else None

    def heard(self, epoch: float, value: float) -> None:
        """Tune has heard of a value."""
        if self.history and self.history[-1][0] >= epoch - _SAME:
            del self.history[-1]
        self.history.append((epoch, value))

    def scores(self) -> list[Score]:
        """Its values at the epochs to which all its targets have come.

        Raises:
            TrainingError: a target is complete without the metric.
        """
        series = {seed: [self._values(target) for target in targets] for seed, targets in self.targets.items()}
        everybodys = [values for of_seed in series.values() for values in of_seed]
        if not everybodys or not all(everybodys):
            return []
        first = max(values[0][0] for values in everybodys)
        under_way = [target for target in self.watched if not target.is_complete]
        last = min((self._values(target)[-1][0] for target in under_way), default=float("inf"))
        epochs = sorted({epoch for values in everybodys for epoch, _ in values})
        return [self._score(series, epoch) for epoch in epochs if first - _SAME <= epoch <= last + _SAME]

    def _score(self, series: Mapping[int, Sequence[Sequence[tuple[float, float]]]], epoch: float) -> Score:
        by_seed = {
            seed: points.value_of(self._sweep, [_at(values, epoch) for values in of_seed])
            for seed, of_seed in series.items()
        }
        return epoch, sum(by_seed.values()) / len(by_seed), by_seed

    def _values(self, target: Watched) -> list[tuple[float, float]]:
        if target.is_complete and self._metric not in target.metrics:
            raise TrainingError(
                f"{target.stage.address} is complete, but measured no {self._metric}, which the sweep "
                f"{self._sweep.name!r} compares. It has: {', '.join(target.metrics)}."
            )
        return target.values(self._metric, self._epochs)

    @property
    def _workers(self) -> set[Any]:
        return {target.worker for target in self.watched if target.worker}


def _at(values: Sequence[tuple[float, float]], epoch: float) -> float:
    """The last value up to an epoch."""
    return next(value for at, value in reversed(values) if at <= epoch + _SAME)
