"""From a point (path -> value) to recipes, and what is wrong with a sweep, found before anything starts.

A point becomes a recipe a seed. Stages are shared by their keys: teacher and meta
model differ by seed, but all points of a seed have the same, and none trains them
again.
"""

import difflib
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from m2mkd_ray import preflight
from m2mkd_ray.errors import PlanError, UsageError
from m2mkd_ray.execution.stage import Stage, in_order
from m2mkd_ray.pipeline import variant
from m2mkd_ray.recipe import Phase, Recipe, changed
from m2mkd_ray.recipes.choose import choose
from m2mkd_ray.sweeps.space import Domain, Parameter, active
from m2mkd_ray.sweeps.sweep import AllPairs, Asha, Full, OnePair, Sweep

Point = Mapping[str, Any]
"""Values by dotted path of a recipe, of parameters that have an effect."""

OF_TRAINING = {"val_top1": "max", "loss": "min", "ce": "min"}
"""What a training's history has at every level, and which way is better."""

MOST_CORNERS = 64
"""Combinations of domains' ends that are tried."""


def base(sweep: Sweep) -> Recipe:
    """The recipe that all points change.

    Raises:
        UsageError: there is no such recipe or setting, or it does not fit together.
    """
    recipe = choose(sweep.recipe)
    return changed(recipe, sweep.settings) if sweep.settings else recipe


def recipes(sweep: Sweep, point: Point, of: Recipe | None = None) -> dict[int, Recipe]:
    """The recipe of a point, by seed. `of` is `base(sweep)`, where it is at hand.

    Raises:
        UsageError: a path is misspelt or a value does not fit.
    """
    recipe = changed(base(sweep) if of is None else of, point)
    placement = recipe.placement
    seated = placement.model_copy(update={"pairs": placement.pairs.model_copy(update={"cohort": sweep.cohort})})
    if placement.pairs.ranks == 1:
        recipe = recipe.model_copy(update={"placement": seated})
    return {seed: recipe.model_copy(update={"seed": seed, "baselines": ()}) for seed in sweep.seeds}


def targets(sweep: Sweep, recipe: Recipe) -> list[Stage]:
    """The stages of a recipe whose metric counts, with all that they read below them.

    At the full level the fine-tuning, whose history has `val_top1`, or, for a suite's accuracy, the evaluation of the
    student.
    """
    stages = variant(recipe)
    match sweep.level:
        case OnePair(index=index):
            return [stages[f"pair-{index}"]]
        case AllPairs():
            return [stages[f"pair-{pair.index}"] for pair in recipe.blueprint.pairs]
        case Full():
            return [stages["finetune" if sweep.measured in OF_TRAINING else "evaluate-student"]]


def recorded(sweep: Sweep, recipe: Recipe) -> list[Stage]:
    """The stages of a recipe that its trial accounts for: the targets, and the pairs below them."""
    own = targets(sweep, recipe)
    return [stage for stage in in_order(own) if stage.name.startswith("pair-") or stage in own]


def value_of(sweep: Sweep, values: Sequence[float]) -> float:
    """What counts of the targets' values of one seed: the only one, their mean, or the worst."""
    if isinstance(sweep.level, AllPairs) and sweep.level.over == "worst":
        return min(values) if sweep.mode == "max" else max(values)
    return sum(values) / len(values)


def metric_of(sweep: Sweep) -> str:
    """The name of the metric among those that the targets report or return."""
    return sweep.measured if sweep.measured in OF_TRAINING else f"student/{sweep.measured}"


def phase_of(sweep: Sweep, recipe: Recipe) -> Phase:
    """The training whose epochs the scheduler counts."""
    return recipe.finetune if isinstance(sweep.level, Full) else recipe.pairs


def epochs_of(sweep: Sweep, recipe: Recipe) -> float:
    """Epochs of a whole trial, as its scheduler counts them."""
    most = sweep.scheduler.max if isinstance(sweep.scheduler, Asha) else None
    return phase_of(sweep, recipe).epochs if most is None else most


def check(sweep: Sweep) -> Recipe:
    """The sweep's recipe, if nothing is wrong with the sweep.

    Raises:
        UsageError: there is no such recipe or setting.
        PlanError: something else is wrong; lists every problem.
    """
    recipe = base(sweep)
    if found := problems(sweep, recipe):
        raise PlanError(
            f"The sweep {sweep.name!r} cannot start; {len(found)} problem{'s' * (len(found) > 1)}:\n"
            + "\n".join(f"- {problem}" for problem in found)
        )
    return recipe


def problems(sweep: Sweep, recipe: Recipe) -> list[str]:
    """What is wrong with a sweep of a recipe, whatever the machines; empty if it can run."""
    found = [*_of_level(sweep, recipe), *_of_metric(sweep, recipe), *_of_searcher(sweep)]
    return [*found, *_of_scheduler(sweep, recipe), *_of_space(sweep, recipe)]


def _of_level(sweep: Sweep, recipe: Recipe) -> Iterator[str]:
    if recipe.start == "scratch":
        yield f"recipe {recipe.name!r} has no pairs: its student starts from random weights. Sweep one that distils"
    number = recipe.blueprint.num_modules
    if isinstance(sweep.level, OnePair) and sweep.level.index >= number:
        yield f"level.index {sweep.level.index}: there is no such pair, only 0 to {number - 1}"


def _of_metric(sweep: Sweep, recipe: Recipe) -> Iterator[str]:
    known = dict(OF_TRAINING)
    if isinstance(sweep.level, Full):
        known |= {f"{suite}/top1": "max" for suite in recipe.suites}
    if sweep.measured not in known:
        yield (
            f"metric {sweep.measured!r}: no trial of level {sweep.level.kind} reports it. Known: {', '.join(known)}"
            + (_near(sweep.measured, known))
        )
    elif known[sweep.measured] != sweep.mode:
        yield f"mode {sweep.mode} looks for the worst {sweep.measured}: set mode to {known[sweep.measured]}"


def _of_searcher(sweep: Sweep) -> Iterator[str]:
    if sweep.searcher.kind == "optuna" and find_spec("optuna") is None:
        yield "searcher optuna: Optuna is not installed. Install the extra: pip install 'm2mkd_ray[optuna]'"
    if sweep.searcher.kind == "tune":
        from m2mkd_ray.sweeps.asking import searcher_of

        try:
            searcher_of(sweep.searcher)
        except (AssertionError, ImportError, TypeError, ValueError) as error:  # each says it in another way
            yield f"searcher {sweep.searcher.name}: {error}"
    sizes = [len(of.parsed.values or ()) for of in sweep.space.values()]
    if sweep.searcher.kind == "grid" and math.prod(sizes) > sweep.budget.trials:
        yield f"the grid has {math.prod(sizes)} points, but budget.trials is {sweep.budget.trials}: raise it"


def _of_scheduler(sweep: Sweep, recipe: Recipe) -> Iterator[str]:
    scheduler = sweep.scheduler
    if scheduler.kind == "none":
        return
    phase, most = phase_of(sweep, recipe), epochs_of(sweep, recipe)
    name = "finetune" if isinstance(sweep.level, Full) else "pairs"
    if f"{name}.epochs" in sweep.space:
        yield (
            f"space.{name}.epochs: scheduler {scheduler.kind} compares trials at the same epoch of trainings that are "
            f"equally long. Leave it out, or set scheduler to none"
        )
    if scheduler.grace >= most:
        yield f"scheduler.grace {scheduler.grace:g} leaves nothing to stop: a trial has {most:g} epochs"
    if most > phase.epochs:
        yield f"scheduler.max {most:g} is more than {name}.epochs {phase.epochs:g}"
    if isinstance(sweep.level, Full) and sweep.measured.endswith("/top1"):
        yield f"scheduler {scheduler.kind} compares trials as they train; {sweep.measured} is known at the end only"
    every = phase.validate_every_epochs
    if sweep.measured == "val_top1" and (every is None or every > scheduler.grace):
        yield (
            f"scheduler.grace {scheduler.grace:g} is over before {name} is validated: set "
            f"{name}.validate_every_epochs, now {every}, to {scheduler.grace:g} or less"
        )


def _of_space(sweep: Sweep, recipe: Recipe) -> Iterator[str]:
    found = [problem for path in sweep.space for problem in _of_parameter(path, sweep, recipe)]
    yield from found
    if not found and recipe.start != "scratch":  # else it was told of each alone
        yield from _of_corners(sweep, recipe)


def _of_parameter(path: str, sweep: Sweep, recipe: Recipe) -> Iterator[str]:
    """Every end of one domain, alone, with what its condition asks for."""
    parameter = sweep.space[path]
    asked = _asked(path, sweep.space)
    bad, tried = dict[str, list[Any]](), list[Recipe]()
    for value in inside_and_ends(parameter.parsed):
        try:
            tried.append(changed(recipe, {**asked, path: value}))
        except UsageError as error:
            bad.setdefault(str(error).partition("\n")[2].strip(), []).append(value)
    for said, values in bad.items():
        hint = f" ({', '.join(map(repr, values))} of {parameter.domain})"
        if "there is no setting" in said:
            hint = "" if "did you mean" in said else _elsewhere(path, recipe)
        yield f"space.{path}: {' '.join(line.strip(' -') for line in said.splitlines())}{hint}"
    if bad or recipe.start == "scratch":
        return
    if not _changes_a_target(sweep, tried):
        yield f"space.{path} changes nothing that is measured at level {sweep.level.kind}: leave it out"
    elif path.startswith(("blueprint.", "data.")) or path.rpartition(".")[2] in ("batch_size", "precision"):
        known = preflight.problems(recipe)
        for problem in dict.fromkeys(found for one in tried for found in preflight.problems(one)):
            if problem not in known:
                yield f"space.{path}, {parameter.domain}: {problem}"


def _changes_a_target(sweep: Sweep, tried: Sequence[Recipe]) -> bool:
    try:
        addresses = {tuple(stage.address for stage in targets(sweep, recipe)) for recipe in tried}
    except KeyError:
        return True  # no such pair, which was told
    return len(addresses) > 1 or len(tried) == 1


def _of_corners(sweep: Sweep, recipe: Recipe) -> Iterator[str]:
    """Ends of all domains together: two settings may each fit alone."""
    for point in corners(sweep.space):
        try:
            changed(recipe, point)
        except UsageError as error:
            told = ", ".join(f"{path}={value}" for path, value in point.items())
            yield f"space: {told}: {' '.join(line.strip(' -') for line in str(error).splitlines()[1:])}"
            return


def corners(space: Mapping[str, Parameter]) -> list[Point]:
    """Combinations of the ends of all domains; of very many, some, the same ones each time."""
    ends = [parameter.parsed.ends for parameter in space.values()]
    if math.prod(map(len, ends)) <= MOST_CORNERS:
        drawn = list(itertools.product(*ends))
    else:
        draw = random.Random(0)
        drawn = [tuple(draw.choice(values) for values in ends) for _ in range(MOST_CORNERS)]
    return [active(space, dict(zip(space, values, strict=True))) for values in drawn]


def inside_and_ends(domain: Domain) -> tuple[Any, ...]:
    """Values to try: the ends, and for a range of fractions one inside, which no whole number is."""
    if domain.kind not in ("uniform", "loguniform"):
        return domain.ends
    low, high = domain.ends
    return (*domain.ends, low + (high - low) * (math.sqrt(2) - 1))


def _asked(path: str, space: Mapping[str, Parameter]) -> dict[str, Any]:
    """Values of the parameters that one's condition is about, and of theirs."""
    asked: dict[str, Any] = {}
    for other, wanted in space[path].when.items():
        asked |= _asked(other, space) | {other: wanted[0] if isinstance(wanted, list | tuple) else wanted}
    return asked


def _elsewhere(path: str, recipe: Recipe) -> str:
    """Where else in the recipe a setting of the last name is."""
    last = path.rpartition(".")[2]
    leaves = list(_paths(recipe.model_dump(exclude={"placement"})))
    same = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last and leaf != path]
    near = same or difflib.get_close_matches(path, leaves, n=2)
    return f". Did you mean {' or '.join(near[:3])}?" if near else ""


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _near(name: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""


__all__ = [
    "Point",
    "base",
    "check",
    "corners",
    "epochs_of",
    "metric_of",
    "phase_of",
    "problems",
    "recipes",
    "recorded",
    "targets",
    "value_of",
]
