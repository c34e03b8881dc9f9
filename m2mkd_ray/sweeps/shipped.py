"""The sweeps that ship, as functions; `SWEEPS` by name.

All are of the demo, which is at hand everywhere. For another recipe: `m2mkd sweep temperature --recipe fashion`,
or a YAML file (`m2mkd sweep show temperature` prints one to start from).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from m2mkd_ray.errors import UsageError
from m2mkd_ray.sweeps.space import Parameter
from m2mkd_ray.sweeps.sweep import AllPairs, Asha, Budget, GridSearch, OnePair, RandomSearch, Sweep, from_yaml

TEMPERATURE = "pairs.distill.temperature"
ALPHA = "pairs.distill.alpha"
REDUCTION = "pairs.distill.reduction"
SEATS = 32
"""Eight trials of all four pairs: the demo's modules are small, and what a worker shares grows with its trials."""


def temperature() -> Sweep:
    """How soft the teacher's targets should be: temperatures of factors of two for every pair, on a grid.

    Command: `m2mkd sweep temperature`. 5 trials of 4 pairs each, for 2 seeds; none is stopped, because the curve
    itself is wanted.
    """
    return Sweep(
        name="temperature",
        title="Temperature of the teacher's targets",
        recipe="demo",
        level=AllPairs(),
        space={TEMPERATURE: Parameter(domain="grid([0.5, 1, 2, 4, 8])")},
        searcher=GridSearch(),
        budget=Budget(trials=5),
        seeds=(0, 1),
        cohort=SEATS,
    )


def loss_weights() -> Sweep:
    """How much the teacher's term should weigh against the labels, with either divisor.

    Command: `m2mkd sweep loss-weights`. The reference's divisor (`numel`, B * K) makes the teacher's term K times
    smaller than textbook distillation's (docs/method.md), so alpha means another thing with each.
    """
    return Sweep(
        name="loss-weights",
        title="Weight of the teacher's term",
        recipe="demo",
        level=AllPairs(),
        space={
            ALPHA: Parameter(domain="uniform(0.05, 0.95)"),
            REDUCTION: Parameter(domain="choice([numel, batchmean])"),
        },
        searcher=RandomSearch(),
        scheduler=Asha(grace=2, reduction=3),
        budget=Budget(trials=18),
        seeds=(0,),
        cohort=SEATS,
    )


def distillation() -> Sweep:
    """Temperature, weight and divisor together.

    Command: `m2mkd sweep distillation`. With `numel` the gradient is as good as the labels' alone whatever the
    temperature, so that is varied with `batchmean` only.
    """
    return Sweep(
        name="distillation",
        title="Temperature × weight × divisor",
        recipe="demo",
        level=AllPairs(),
        space={
            TEMPERATURE: Parameter(domain="loguniform(1, 8)", when={REDUCTION: "batchmean"}),
            ALPHA: Parameter(domain="uniform(0.05, 0.95)"),
            REDUCTION: Parameter(domain="choice([numel, batchmean])"),
        },
        searcher=RandomSearch(),
        scheduler=Asha(grace=2, reduction=3),
        budget=Budget(trials=24),
        seeds=(0, 1),
        cohort=SEATS,
    )


def quick() -> Sweep:
    """All of it in minutes on two cores: the last pair of a demo cut short, of whose trials ASHA stops some early.

    Command: `m2mkd sweep quick`.
    """
    short: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0.25, "validate_every_epochs": 1}
    phases = ("meta", "teacher.incubation", "teacher.phase")
    settings = {f"{phase}.{name}": value for phase in phases for name, value in short.items()}
    return Sweep(
        name="quick",
        title="A quick look",
        recipe="demo",
        settings={
            **settings,
            "data.max_rows": 2560,
            "data.validation.max_rows": 250,
            "pairs.epochs": 4,
            "pairs.warmup_epochs": 0.25,
            "pairs.validate_every_epochs": 1,
            "placement.pairs.log_every_steps": 10,
        },
        level=OnePair(index=3),
        space={
            TEMPERATURE: Parameter(domain="loguniform(1, 8)"),
            "pairs.lr": Parameter(domain="loguniform(1e-4, 4e-3)"),
        },
        searcher=RandomSearch(),
        scheduler=Asha(grace=1, reduction=2),
        budget=Budget(trials=6),
        seeds=(0,),
        cohort=4,
    )


SWEEPS: dict[str, Callable[[], Sweep]] = {
    "distillation": distillation,
    "loss-weights": loss_weights,
    "quick": quick,
    "temperature": temperature,
}


def find_sweep(name: str) -> Sweep:
    """A sweep by its name, or from a YAML file.

    Raises:
        UsageError: there is none, or it does not fit together.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return from_yaml(Path(name))
    if name not in SWEEPS:
        raise UsageError(
            f"There is no sweep {name!r}. Known sweeps: {', '.join(SWEEPS)}; a file of your own ends in .yaml."
        )
    return SWEEPS[name]()
