"""The points of a sweep that are known before it starts: those of a grid, and of random search.

Drawn here and not by Tune while it runs, so that they can be shown before anything
starts, and are the same ones when a sweep is started again.
"""

import itertools
from typing import Any

from m2mkd_ray.sweeps.points import Point
from m2mkd_ray.sweeps.space import active
from m2mkd_ray.sweeps.sweep import RandomSearch, Sweep


def drawn(sweep: Sweep) -> list[Point] | None:
    """The points to try, in order and each once; None: the searcher proposes them from what was measured.

    Domains `grid`, or for grid search all, are gone through in full; random search draws the others
    `budget.trials` times. Draws that come to the same point, as those without an effect do, are one.
    """
    match sweep.searcher:
        case RandomSearch(seed=seed):
            draws = _random(sweep, seed)
        case _ if sweep.searcher.kind == "grid":
            draws = _product(sweep, {path: of.parsed.values for path, of in sweep.space.items()})
        case _:
            return None
    points = [active(sweep.space, draw) for draw in draws]
    return [point for at, point in enumerate(points) if point not in points[:at]]


def _product(sweep: Sweep, lists: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _random(sweep: Sweep, seed: int) -> list[dict[str, Any]]:
    import numpy as np

    random = np.random.default_rng(seed)
    domains = {path: of.parsed for path, of in sweep.space.items()}
    grids = {path: domain.values for path, domain in domains.items() if domain.kind == "grid"}
    draws = []
    for _ in range(sweep.budget.trials):
        sampled = {
            path: domain.to_tune().sample(random_state=random)
            for path, domain in domains.items()
            if domain.kind != "grid"
        }
        draws += [{path: {**grid, **sampled}[path] for path in domains} for grid in _product(sweep, grids)]
    return draws
