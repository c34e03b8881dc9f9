"""A sweep whose trials take seconds: the last pair of the demo's flow, with models of width 16; and ASHA by hand."""

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_ray.execution import Stage, Store
from m2mkd_ray.sweeps.points import Point, base, recipes, targets
from m2mkd_ray.sweeps.results import TrialRecord
from m2mkd_ray.sweeps.sweep import Sweep, validated

SETTINGS = {
    "data.max_rows": 320,
    "data.validation.max_rows": 100,
    "pairs.epochs": 4,
    "pairs.validate_every_epochs": 1,
    "placement.pairs.log_every_steps": 2,
    "placement.pairs.checkpoint_every_s": 0.2,
}
"""Of a recipe as `tiny` in tests/conftest.py, but for what the space varies."""


def small_sweep(recipe: Path, *, settings: Mapping[str, Any] | None = None, **changes: Any) -> Sweep:
    """Learning rate and temperature, eight points in one cohort, of which ASHA stops some."""
    fixed = {**SETTINGS, **(settings or {})}
    tree = {
        "name": "small",
        "title": "Small",
        "recipe": str(recipe),
        "settings": {path: value for path, value in fixed.items() if path not in changes.get("space", ())},
        "level": {"kind": "pair", "index": 1},
        "space": {"pairs.lr": "loguniform(1e-5, 1e-2)", "pairs.distill.temperature": "loguniform(1, 8)"},
        "scheduler": {"kind": "asha", "grace": 1, "reduction": 2},
        "budget": {"trials": 8},
        "cohort": 8,
    }
    return validated(tree | changes, "small")


def of_point(sweep: Sweep, point: Point) -> list[Stage]:
    """What is measured of a point, with one seed."""
    (recipe,) = recipes(sweep, point, base(sweep)).values()
    return targets(sweep, recipe)


def stage_of(sweep: Sweep, trial: TrialRecord) -> Stage:
    """The pair of a trial."""
    (stage,) = of_point(sweep, trial.point)
    return stage


def stopped_by_hand(
    histories: Sequence[Mapping[float, float]], epochs: float, *, grace: float = 1
) -> dict[int, float]:
    """Which trials ASHA stops, by number, and where: Li et al. 2020, with a reduction of 2.

    At a rung a trial stops whose value is below the median of those that came there before it (Tune's cutoff).
    """
    stopped: dict[int, float] = {}
    rungs = [grace * 2.0**power for power in range(10) if grace * 2**power < epochs]
    for rung in rungs:
        seen: list[float] = []
        for number, values in enumerate(histories):
            if number in stopped or rung not in values:
                continue
            if seen and values[rung] < np.percentile(seen, 50):
                stopped[number] = rung
            seen.append(values[rung])
    return stopped


def bits(store: Store, address: str, file: str = "module.safetensors") -> str:
    """The contents of an artifact's file, as a hash."""
    return hashlib.sha256((store.open(address) / file).read_bytes()).hexdigest()


def lent(of: Store, addresses: Iterable[str], folder: Path) -> Store:
    """A store that begins with some of another one's artifacts."""
    for address in addresses:
        shutil.copytree(of.open(address), folder / address)
    return Store(str(folder))
