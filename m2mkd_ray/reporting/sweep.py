"""What the report of a sweep says, as data; figures, tables and page are functions of it and of nothing else.

Every time is in seconds since 1970, an accuracy a fraction from 0 to 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, FiniteFloat

from m2mkd_ray.reporting import units

Value = float | int | str | bool | None
"""Of a parameter. JSON's plain values."""


class SweptParameter(BaseModel, frozen=True, extra="forbid"):
    """A setting that was varied."""

    path: str
    values: tuple[Any, ...] | None
    """All values of a list, in its order; None for a range."""
    low: FiniteFloat | None = None
    """Ends of a range; None for a list."""
    high: FiniteFloat | None = None
    is_log: bool = False
    is_numeric: bool = True

    @property
    def title(self) -> str:
        """Short, for axes: "temperature", "temperature of pair 2"."""
        parts = self.path.split(".")
        if parts[:2] == ["pairs", "of"]:
            return f"{parts[-1]} of pair {parts[2]}"
        return parts[-1] if parts[0] == "pairs" else " ".join(parts[-2:])


class TrialSpan(BaseModel, frozen=True, extra="forbid"):
    """A stage of a trial, while a worker had it."""

    stage: str
    seed: int
    start: FiniteFloat
    end: FiniteFloat
    worker: str


class TrialRow(BaseModel, frozen=True, extra="forbid"):
    """A trial."""

    name: str
    """A number, in the order in which they were made."""
    point: Mapping[str, Any]
    state: Literal["waiting", "running", "complete", "stopped", "failed"]
    history: tuple[tuple[FiniteFloat, FiniteFloat], ...] = ()
    """Epoch and value, the mean over seeds."""
    by_seed: Mapping[int, FiniteFloat] = {}
    """The last value of each seed."""
    spans: tuple[TrialSpan, ...] = ()
    why: str = ""

    @property
    def value(self) -> float | None:
        """The last one; None: there is none."""
        return self.history[-1][1] if self.history else None

    @property
    def epochs(self) -> float:
        """How far it came."""
        return self.history[-1][0] if self.history else 0.0

    def value_at(self, epoch: float) -> float | None:
        """The last value up to an epoch."""
        return next((value for at, value in reversed(self.history) if at <= epoch + 1e-9), None)


class Saving(BaseModel, frozen=True, extra="forbid"):
    """What something cost, and what it would have cost otherwise."""

    what: str
    spent: FiniteFloat
    otherwise: FiniteFloat
    unit: str
    because: str
    """What saves it: "a cohort runs the teacher once"."""

    @property
    def share(self) -> float:
        """Spent by otherwise."""
        return self.spent / self.otherwise if self.otherwise else 1.0


class SweepReport(BaseModel, frozen=True, extra="forbid"):
    """All that the page of a sweep shows."""

    title: str
    name: str
    key: str
    recipe: str
    level: str
    """In words: "all pairs, mean of their hybrids"."""
    metric: str
    mode: Literal["max", "min"]
    seeds: tuple[int, ...]
    scheduler: str
    """In words."""
    state: Literal["running", "complete", "failed"]
    why: str = ""
    created: str
    """When it was begun, in ISO 8601; so is `updated`."""
    updated: str
    parameters: tuple[SweptParameter, ...]
    trials: tuple[TrialRow, ...]
    rungs: tuple[FiniteFloat, ...] = ()
    """Epochs at which trials may be stopped."""
    savings: tuple[Saving, ...] = ()
    sweep_yaml: str
    best_yaml: str = ""
    """The recipe of the best trial; empty: there is none yet."""
    best_file: str = ""
    notes: tuple[str, ...] = ()

    @property
    def ranked(self) -> tuple[TrialRow, ...]:
        """Trials with a value, the best first: those that came to their end before all others."""
        sign = -1 if self.mode == "max" else 1
        known = [trial for trial in self.trials if trial.value is not None and trial.state != "failed"]
        return tuple(sorted(known, key=lambda t: (t.state != "complete", sign * (t.value or 0.0), int(t.name))))

    @property
    def best(self) -> TrialRow | None:
        """The trial that is ahead."""
        return next(iter(self.ranked), None)

    @property
    def is_share(self) -> bool:
        """Whether the metric is an accuracy, and is shown in percent."""
        return self.metric.endswith("top1")

    @property
    def metric_title(self) -> str:
        """For axes, with its unit."""
        titles = {"val_top1": "validation top-1, %", "loss": "training loss", "ce": "cross-entropy"}
        return titles.get(self.metric, f"{self.metric}{', %' if self.is_share else ''}")

    def shown(self, value: float) -> float:
        """A value in the metric's unit."""
        return 100 * value if self.is_share else value

    def said(self, value: float) -> str:
        """A value in words."""
        return units.percent(value) if self.is_share else f"{value:.4g}"

    @property
    def common_epoch(self) -> float | None:
        """The last epoch at which all trials that have a value have one: where they can be compared alike."""
        known = [trial.epochs for trial in self.ranked]
        return min(known) if known else None

    @property
    def noise(self) -> float | None:
        """Standard deviation between seeds, pooled over trials that came to their end; None with one seed."""
        squares, freedom = 0.0, 0
        for trial in self.trials:
            values = list(trial.by_seed.values())
            if trial.state == "complete" and len(values) > 1:
                squares += float(np.var(values) * len(values))
                freedom += len(values) - 1
        return math.sqrt(squares / freedom) if freedom else None


class Importance(BaseModel, frozen=True, extra="forbid"):
    """How much of the differences between trials one parameter tells."""

    path: str
    explained: FiniteFloat
    """Share of the variance, adjusted for the number of trials; 0 to 1."""
    num_trials: int


def importances(report: SweepReport) -> tuple[Importance, ...]:
    """Variance of the values that each parameter explains alone, the most important first.

    Adjusted R^2 (Ezekiel, 1930) of a fit to that parameter only: a mean for every value of a list of words, a
    parabola (over the logarithm, where the domain is logarithmic) for numbers. Values are those at the last epoch
    that all trials reached. Interactions are not seen, and parameters that were drawn together by chance share what
    they explain. A parameter that had an effect in a part of the trials is judged by these. Empty: too few trials.
    """
    found = []
    for parameter in report.parameters:
        trials = [trial for trial in report.ranked if parameter.path in trial.point]
        values = np.array([trial.value_at(report.common_epoch or 0.0) for trial in trials], dtype=float)
        share = _explained(parameter, [trial.point[parameter.path] for trial in trials], values)
        if share is not None:
            found.append(Importance(path=parameter.path, explained=share, num_trials=len(trials)))
    return tuple(sorted(found, key=lambda one: -one.explained))


def _explained(parameter: SweptParameter, at: Sequence[Value], values: np.ndarray) -> float | None:
    """Adjusted R^2, at least 0; None where there are too few trials, or their values do not differ."""
    design = _design(parameter, at)
    num_trials, num_terms = design.shape
    total = float(((values - values.mean()) ** 2).sum()) if num_trials else 0.0
    if num_trials - num_terms < 2 or total < 1e-18 or num_terms < 2:
        return None
    fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    left = float(((values - fitted) ** 2).sum()) / (num_trials - num_terms)
    return max(0.0, 1 - left / (total / (num_trials - 1)))


def _design(parameter: SweptParameter, at: Sequence[Value]) -> np.ndarray:
    """Terms of the fit, a row a trial: (trials, terms)."""
    if not parameter.is_numeric:
        names = sorted({str(value) for value in at})
        return np.array([[float(str(value) == name) for name in names] for value in at]).reshape(len(at), len(names))
    x = scaled(parameter, [float(value) for value in at])  # type: ignore[arg-type]  # numeric
    num_terms = min(3, len(set(x.tolist())))
    return np.vander(x - x.mean() if len(x) else x, num_terms, increasing=True)


def scaled(parameter: SweptParameter, values: Sequence[float]) -> np.ndarray:
    """Numbers as their axis has them: logarithms of a logarithmic domain."""
    array = np.asarray(values, dtype=float)
    return np.log(array) if parameter.is_log else array


def fit(parameter: SweptParameter, at: Sequence[float], values: Sequence[float]) -> np.ndarray | None:
    """The parabola of `importances` as coefficients, highest first, over `scaled`; None: too few trials."""
    x = scaled(parameter, at)
    if len(set(x.tolist())) < 3 or len(x) < 5:
        return None
    return np.asarray(np.polyfit(x, np.asarray(values), 2))


def value_word(value: Value) -> str:
    """A parameter's value, short: 3 digits of a number."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
