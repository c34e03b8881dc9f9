"""What came of a sweep, as data: its trials, their stages, and what these cost.

Written whole whenever a trial changes, to `sweeps/<name>-<key>/results.json` below the
store's root; status, best, the report and the best recipe are drawn from it and from
nothing else, also while the sweep runs.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from m2mkd_ray.errors import ArtifactError
from m2mkd_ray.execution import Store
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.sweep import Sweep

FILE = "results.json"

TrialState = Literal["waiting", "running", "complete", "stopped", "failed"]
"""stopped: by the scheduler or the budget, before its end."""

COUNTED = ("flops", "teacher_calls", "cache_hits", "decodes")
"""Counters of a stage that are added up (`m2mkd_ray.training.counters`)."""


class StageRecord(BaseModel, frozen=True, extra="forbid"):
    """A stage that a trial accounts for (`points.recorded`): a pair, or one whose metric counts."""

    name: str
    address: str
    seed: int
    state: Literal["waiting", "running", "complete", "stopped", "failed"] = "waiting"
    reused: bool = False
    """Whether it was complete before this trial asked for it: another one has it, or an earlier run."""
    epochs: FiniteFloat = 0.0
    """How many it was trained for."""
    images: FiniteFloat = 0.0
    """Images of all its steps."""
    history: tuple[tuple[FiniteFloat, FiniteFloat], ...] = ()
    """Epoch and metric, in order."""
    started: FiniteFloat | None = None
    """When a worker first took it up, in seconds since 1970."""
    ended: FiniteFloat | None = None
    worker: str = ""
    """Host and process that ran it last."""
    counters: Mapping[str, FiniteFloat] = {}
    """What it counted in all, of `COUNTED`; its shares of what a cohort did together."""
    counted_images: FiniteFloat = 0.0
    """Images of the steps that counters are of. One that was stopped went on until it was told."""


class TrialRecord(BaseModel, frozen=True, extra="forbid"):
    """A trial."""

    name: str
    """Ray Tune's id."""
    point: Mapping[str, Any]
    """Values by path, of parameters that have an effect."""
    state: TrialState = "waiting"
    history: tuple[tuple[FiniteFloat, FiniteFloat], ...] = ()
    """Epoch and value (mean over seeds), as they were reported to the scheduler."""
    by_seed: Mapping[int, FiniteFloat] = {}
    """The last value of each seed."""
    stages: tuple[StageRecord, ...] = ()
    started: FiniteFloat | None = None
    ended: FiniteFloat | None = None
    why: str = ""
    """Who stopped it, or what it failed of."""

    @property
    def value(self) -> float | None:
        """The last one; None: it has none yet."""
        return self.history[-1][1] if self.history else None

    @property
    def epochs(self) -> float:
        """How far it came."""
        return self.history[-1][0] if self.history else 0.0

    def value_at(self, epoch: float) -> float | None:
        """The last value up to an epoch; None: it had none."""
        return next((value for at, value in reversed(self.history) if at <= epoch + 1e-9), None)


class SweepResults(BaseModel, frozen=True, extra="forbid"):
    """All of it."""

    sweep: Sweep
    state: Literal["running", "complete", "failed"] = "running"
    why: str = ""
    """What ended it early: the budget, say."""
    created: FiniteFloat
    """When it was begun, in seconds since 1970."""
    updated: FiniteFloat
    seconds: FiniteFloat = 0.0
    """How long it was under way, in all runs together."""
    gpu_seconds: FiniteFloat = 0.0
    """GPUs times the seconds that workers held them."""
    trials: tuple[TrialRecord, ...] = ()
    shared: tuple[StageRecord, ...] = ()
    """What the trials read and none accounts for: data, meta models, teachers, each once."""
    versions: Mapping[str, str] = Field(default={})

    @property
    def numbers(self) -> dict[str, int]:
        """A number for each trial, by name: the place of its point in the plan, where there is one (`draw.py`).

        Trials begin in whatever order there is room for them, so their own order is not that of the plan.
        """
        planned = drawn(self.sweep) or []
        return {
            trial.name: planned.index(trial.point) if trial.point in planned else len(planned) + at
            for at, trial in enumerate(self.trials)
        }

    @property
    def best(self) -> TrialRecord | None:
        """The trial that is ahead; None: none has a value."""
        return next(iter(self.ranked), None)

    @property
    def ranked(self) -> list[TrialRecord]:
        """Trials that have a value, the best first: those that came to their end before those that did not."""
        sign = -1 if self.sweep.mode == "max" else 1
        known = [trial for trial in self.trials if trial.value is not None and trial.state != "failed"]
        return sorted(known, key=lambda t: (t.state != "complete", sign * (t.value or 0.0), t.name))


def write(store: Store, results: SweepResults) -> None:
    """Put the results in the place of the last ones, whole."""
    text = results.model_dump_json(indent=1) + "\n"
    store.folders.write(f"{results.sweep.folder}/{FILE}", text.encode())


def read(store: Store, sweep: Sweep) -> SweepResults:
    """The newest results of a sweep.

    Raises:
        ArtifactError: it was never started with this store, or its file cannot be read.
    """
    found = store.folders.read(f"{sweep.folder}/{FILE}")
    where = f"{store.root}/{sweep.folder}/{FILE}"
    if found is None:
        raise ArtifactError(
            f"The sweep {sweep.name!r} has no results in {store.root}: there is no {where}. Run it first, "
            f"with the same settings and the same --store."
        )
    try:
        return SweepResults.model_validate(json.loads(found))
    except (ValueError, ValidationError) as error:
        raise ArtifactError(
            f"The results of the sweep {sweep.name!r} at {where} cannot be read: {error}. Move the file away and run "
            f"the sweep again: what is complete in the store is not trained again."
        ) from error
