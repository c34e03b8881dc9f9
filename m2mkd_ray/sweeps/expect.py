"""What a sweep would do, without doing any of it: its points, its stages, what they cost together and alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from m2mkd_ray.execution import Store
from m2mkd_ray.execution.stage import Stage, in_order
from m2mkd_ray.recipe import Recipe
from m2mkd_ray.sweeps import points
from m2mkd_ray.sweeps.cost import Cost, alone, images_of, is_pair, seated, together
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.points import Point
from m2mkd_ray.sweeps.sweep import Sweep


@dataclass(frozen=True)
class Expected:
    """A sweep's plan. Costs are those of all trials at their full length: whoever is stopped costs less."""

    points: tuple[Point, ...] | None
    """None: the searcher proposes them from what was measured."""
    num_trials: int
    epochs: float
    """Of a whole trial, as its scheduler counts them."""
    shared: tuple[Stage, ...]
    """What trials read and none accounts for, each once."""
    to_make: tuple[Stage, ...]
    """Those of `shared` that the store does not have."""
    trained: tuple[Stage, ...]
    """What trials account for, each once. Without points: those of the first corner of the space."""
    to_train: tuple[Stage, ...]
    """Those of `trained` that the store does not have."""
    cohorts: tuple[int, ...]
    """Members of each cohort of pairs, if seats are filled as trials are made."""
    together: Cost | None
    """Of the pairs; None: points are not known, or the data set is not there."""
    alone: Cost | None

    @property
    def share(self) -> float | None:
        """Floating-point operations together by those alone."""
        return self.together.flops / self.alone.flops if self.together and self.alone and self.alone.flops else None


def expect(sweep: Sweep, recipe: Recipe, store: Store) -> Expected:
    """What a sweep of a recipe would do with a store; reads which artifacts are complete."""
    known = drawn(sweep)
    tried: Sequence[Point] = points.corners(sweep.space)[:1] if known is None else known
    of_trials = [points.recipes(sweep, point, recipe) for point in tried]
    variants = [one for of_seed in of_trials for one in of_seed.values()]
    recorded = [(stage, one) for one in variants for stage in points.recorded(sweep, one)]
    trained = {stage.address: stage for stage, _ in recorded}
    everything = in_order(trained.values())
    shared = [stage for stage in everything if stage.address not in trained]
    pairs = [(stage, one) for stage, one in recorded if is_pair(stage)]
    cohorts = seated([stage for stage, _ in pairs], sweep.cohort)
    images = {stage.address: images_of(stage, one) for stage, one in pairs}
    shares = (together([(stage, images[stage.address]) for stage in cohort], recipe) for cohort in cohorts)
    separate = (alone(stage, images[stage.address], one) for stage, one in pairs)
    return Expected(
        points=None if known is None else tuple(known),
        num_trials=sweep.budget.trials if known is None else len(known),
        epochs=points.epochs_of(sweep, recipe),
        shared=tuple(shared),
        to_make=tuple(stage for stage in shared if not _is_complete(stage, store)),
        trained=tuple(trained.values()),
        to_train=tuple(stage for stage in trained.values() if not _is_complete(stage, store)),
        cohorts=tuple(map(len, cohorts)) if known is not None else (),
        together=None if known is None else _sum(shares),
        alone=None if known is None else _sum(separate),
    )


def _is_complete(stage: Stage, store: Store) -> bool:
    return store.status(stage.address).state == "complete"


def _sum(costs: Iterable[Cost]) -> Cost | None:
    total = sum(costs, Cost())
    return total if total.flops else None
