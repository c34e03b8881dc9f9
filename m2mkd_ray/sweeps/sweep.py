"""A sweep, as frozen data: which settings of a recipe are varied, what is measured, and who decides what is tried.

It is written as a function (`shipped.py`) or a YAML file, and reads the same both ways.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from m2mkd_ray.errors import UsageError
from m2mkd_ray.sweeps.space import Parameter, any_of, circles
from m2mkd_ray.yaml_files import read_mapping

MID_TRAINING = ("pbt", "pb2", "pbt_replay", "population")
"""Schedulers that change settings while a stage trains."""


class OnePair(BaseModel, frozen=True, extra="forbid"):
    """A trial trains one pair; its hybrid is measured."""

    kind: Literal["pair"] = "pair"
    index: int = Field(ge=0)


class AllPairs(BaseModel, frozen=True, extra="forbid"):
    """A trial trains all pairs; their hybrids are measured."""

    kind: Literal["stage"] = "stage"
    over: Literal["mean", "worst"] = "mean"
    """What of the hybrids counts."""


class Full(BaseModel, frozen=True, extra="forbid"):
    """A trial goes through to the fine-tuned student, which is measured."""

    kind: Literal["full"] = "full"


Level = Annotated[OnePair | AllPairs | Full, Field(discriminator="kind")]


class RandomSearch(BaseModel, frozen=True, extra="forbid"):
    """Points drawn at random; domains `grid` are gone through in full, `budget.trials` times over."""

    kind: Literal["random"] = "random"
    seed: int = Field(0, ge=0)


class GridSearch(BaseModel, frozen=True, extra="forbid"):
    """Every point of a space whose domains are all lists, once."""

    kind: Literal["grid"] = "grid"


class OptunaSearch(BaseModel, frozen=True, extra="forbid"):
    """Optuna's sampler (TPE) proposes points from those that were measured. Needs the extra `optuna`."""

    kind: Literal["optuna"] = "optuna"
    seed: int = Field(0, ge=0)


class TuneSearch(BaseModel, frozen=True, extra="forbid"):
    """Another searcher of Ray Tune's, whose package has to be installed."""

    kind: Literal["tune"] = "tune"
    name: Literal["ax", "bayesopt", "hebo", "hyperopt", "nevergrad", "optuna", "zoopt"]
    """As Tune calls it (`ray.tune.search.SEARCH_ALG_IMPORT`). Not bohb: its scheduler pauses trials."""
    arguments: Mapping[str, Any] = {}
    """Of its class, by name, such as `{random_state_seed: 3}` for hyperopt."""


Searcher = Annotated[RandomSearch | GridSearch | OptunaSearch | TuneSearch, Field(discriminator="kind")]


class NoScheduler(BaseModel, frozen=True, extra="forbid"):
    """Every trial goes to its end."""

    kind: Literal["none"] = "none"


class Asha(BaseModel, frozen=True, extra="forbid"):
    """Asynchronous successive halving (Li et al., MLSys 2020): at every rung the best 1 / `reduction` go on."""

    kind: Literal["asha"] = "asha"
    grace: float = Field(gt=0)
    """Epochs that every trial gets: the first rung."""
    reduction: float = Field(3, gt=1)
    max: float | None = Field(None, gt=0)
    """Epochs of a whole trial; None: the recipe's."""


class Median(BaseModel, frozen=True, extra="forbid"):
    """Stops a trial whose best value is below the median of the others' running averages (Golovin et al., 2017)."""

    kind: Literal["median"] = "median"
    grace: float = Field(gt=0)
    """Epochs that every trial gets."""
    min_trials: int = Field(3, gt=0)
    """Other trials that must have come as far."""


Scheduler = Annotated[NoScheduler | Asha | Median, Field(discriminator="kind")]


class Budget(BaseModel, frozen=True, extra="forbid"):
    """When no further trial is started; what is first reached counts. Trials under way are stopped by the clocks."""

    trials: int = Field(gt=0)
    """Draws of a searcher. A grid has as many points as it has."""
    gpu_hours: float | None = Field(None, gt=0)
    """Hours times GPUs that trials held; None: no limit."""
    hours: float | None = Field(None, gt=0)
    """Since the sweep was started; None: no limit."""


class Sweep(BaseModel, frozen=True, extra="forbid"):
    """A search over settings of a recipe."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    title: str
    recipe: str
    """A recipe's name, a baseline's, or a YAML file's."""
    settings: Mapping[str, Any] = {}
    """What is other in that recipe, for every trial, by dotted path."""
    level: Level
    metric: str = ""
    """What is compared; empty: `val_top1`, the accuracy on the validation rows of what the level measures."""
    mode: Literal["max", "min"] = "max"
    space: Mapping[str, Parameter]
    """Domains by dotted path of the recipe's settings."""
    searcher: Searcher = RandomSearch()
    scheduler: Scheduler = NoScheduler()
    budget: Budget
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """The recipe's seeds with which every point is trained; a trial's value is the mean over them."""
    cohort: int = Field(8, gt=0)
    """Seats of a worker: most members that train there on the same batches. Decides no result."""

    @field_validator("scheduler", mode="before")
    @classmethod
    def _keeps_settings(cls, value: Any) -> Any:
        kind = value.get("kind") if isinstance(value, Mapping) else value
        if isinstance(kind, str) and kind.lower() in MID_TRAINING:
            raise ValueError(
                f"{kind} changes settings in the middle of a training, but a stage's key is made from the settings "
                f"that it has from first to last: its artifact could not say what it is. Use asha or median"
            )
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("searcher", mode="before")
    @classmethod
    def _searcher_by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> "Sweep":
        problems = []
        if not self.space:
            problems.append("space is empty: name at least one setting and its domain")
        for path, parameter in self.space.items():
            strange = [other for other in parameter.when if other not in self.space]
            if strange:
                problems.append(f"space.{path}: `when` names {', '.join(strange)}, which the space does not vary")
            problems += [
                f"space.{path}: `when` waits for {other} to be {wanted}, which {self.space[other].domain} never is"
                for other, wanted in parameter.when.items()
                if other in self.space and not any(map(self.space[other].parsed.may_be, any_of(wanted)))
            ]
        if waiting := circles(self.space):
            problems.append(f"the conditions of {', '.join(waiting)} wait for each other")
        ranges = [path for path, parameter in self.space.items() if parameter.parsed.values is None]
        if self.searcher.kind == "grid" and ranges:
            problems.append(f"searcher grid needs lists, but {', '.join(ranges)} is a range: use choice or grid")
        grids = [path for path, parameter in self.space.items() if parameter.parsed.kind == "grid"]
        if self.searcher.kind in ("optuna", "tune") and grids:
            problems.append(f"searcher {self.searcher.kind} takes no grid ({', '.join(grids)}): use choice")
        steps = [path for path, parameter in self.space.items() if parameter.parsed.kind == "qloguniform"]
        if self.searcher.kind == "optuna" and steps:
            problems.append(f"searcher optuna draws no qloguniform ({', '.join(steps)}): use lograndint or choice")
        if both := sorted(set(self.settings) & set(self.space)):
            problems.append(f"{', '.join(both)} is in settings and in space: leave it out of one")
        if len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds {self.seeds} has one more than once")
        if "seed" in self.space or "seed" in self.settings:
            problems.append("the seed is not varied by the space: list `seeds`")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def measured(self) -> str:
        """The metric's name."""
        return self.metric or "val_top1"

    @property
    def key(self) -> str:
        """Twelve hex digits that stand for the search: everything but what it is called and where it runs.

        Of a recipe file its contents count.
        """
        tree = self.model_dump(mode="json", exclude={"name", "title", "cohort"})
        file = Path(self.recipe)
        if file.suffix in (".yaml", ".yml") and file.is_file():
            tree["recipe"] = hashlib.sha256(file.read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """Where its results lie, below the store's root."""
        return f"sweeps/{self.name}-{self.key}"


def from_yaml(file: Path) -> Sweep:
    """A sweep from its file.

    Raises:
        UsageError: the file is missing, no YAML, or does not fit; lists every problem.
    """
    return validated(read_mapping(file, "sweep file", "what is varied and what for"), str(file))


def to_yaml(sweep: Sweep) -> str:
    """The whole sweep as YAML."""
    return yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def validated(tree: Any, source: str) -> Sweep:
    """A sweep from plain values.

    Raises:
        UsageError: they do not fit; lists every problem.
    """
    try:
        return Sweep.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(
            f"  - {'.'.join(map(str, problem['loc'])) or 'sweep'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        raise UsageError(f"The sweep {source!r} does not fit together:\n{problems}") from error
