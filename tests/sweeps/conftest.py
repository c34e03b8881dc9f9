"""Sweeps to test with: results as a run leaves them, made by a formula, and a cluster to run small ones on."""

import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Small sweeps are a module of their own, because tests of another folder import it too.
sys.path.insert(0, str(Path(__file__).parent))

from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.sweeps import find_sweep
from m2mkd_ray.sweeps.cost import images_of, is_pair, together
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.points import Point, base, recipes, recorded
from m2mkd_ray.sweeps.results import StageRecord, SweepResults, TrialRecord
from m2mkd_ray.sweeps.sweep import Sweep

BEGAN = 1_790_000_000.0
EPOCHS = (2.0, 6.0)
"""Of the first rung, and of a whole trial."""
STOPPED_FROM = 8
"""Of the trials in their order, those from this one on are stopped at the first rung."""


def accuracy(point: Point, epochs: float, seed: int) -> float:
    """Best at a temperature of 4 and an alpha of 0.7, where the divisor is the batch's."""
    reached = 0.55 + 0.1 * (1 - math.exp(-epochs / 3)) + 0.012 * seed
    if point["pairs.distill.reduction"] == "numel":
        return reached - 0.03
    off = math.log(point["pairs.distill.temperature"] / 4) ** 2
    return reached + 0.1 - 0.03 * off - 0.1 * (point["pairs.distill.alpha"] - 0.7) ** 2


@pytest.fixture(scope="session")
def sweep() -> Sweep:
    tree = find_sweep("distillation").model_dump(mode="json")
    return Sweep.model_validate(tree | {"budget": {"trials": 12}})


@pytest.fixture(scope="session")
def results(sweep: Sweep) -> SweepResults:
    """Twelve trials of two seeds in cohorts of eight; four are stopped at the first rung."""
    recipe = base(sweep)
    trials = []
    for number, point in enumerate(drawn(sweep) or ()):
        epochs = EPOCHS[: 1 if number >= STOPPED_FROM else 2]
        history = [(epoch, sum(accuracy(point, epoch, seed) for seed in sweep.seeds) / 2) for epoch in epochs]
        start = BEGAN + 400 * (number // 2)
        stages = []
        for seed, one in recipes(sweep, point, recipe).items():
            for place, stage in enumerate(filter(is_pair, recorded(sweep, one))):
                images = images_of(stage, one, epochs[-1])
                mates = [(stage, images)] * 8
                share = together(mates, one)
                stages.append(
                    StageRecord(
                        name=stage.name,
                        address=stage.address,
                        seed=seed,
                        state="complete" if len(epochs) == 2 else "stopped",
                        epochs=epochs[-1],
                        images=images,
                        counted_images=images,
                        history=tuple((epoch, accuracy(point, epoch, seed)) for epoch in epochs),
                        started=start + place,
                        ended=start + place + 60 * epochs[-1],
                        worker=f"node-1:{100 + seed}",
                        counters={
                            "flops": share.flops / 8,
                            "teacher_calls": share.teacher_calls / 8,
                            "decodes": share.decodes / 8,
                        },
                    )
                )
        trials.append(
            TrialRecord(
                name=f"trial_{number:05d}",
                point=point,
                state="complete" if len(epochs) == 2 else "stopped",
                history=tuple(history),
                by_seed={seed: accuracy(point, epochs[-1], seed) for seed in sweep.seeds},
                stages=tuple(stages),
                started=start,
                ended=start + 60 * epochs[-1],
                why="" if len(epochs) == 2 else "the scheduler, at 2 epochs",
            )
        )
    shared = tuple(
        StageRecord(name=name, address=f"{name}-{seed:012d}", seed=seed, state="complete", epochs=6.0)
        for seed in sweep.seeds
        for name in ("data", "meta", *(f"incubate-{index}" for index in range(4)), "assemble-teacher", "teacher")
    )
    return SweepResults(
        sweep=sweep, state="complete", created=BEGAN, updated=BEGAN + 3000, trials=tuple(trials), shared=shared
    )


@pytest.fixture(scope="module")
def launcher() -> Iterator[RayLauncher]:
    """One local Ray of two cores and a GPU that nobody has, for all sweeps of a file."""
    # Short: sockets in it have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="m2s-", ignore_cleanup_errors=True) as folder:
        launcher = RayLauncher(num_cpus=2, num_gpus=1, temp_dir=folder)
        yield launcher
        launcher.close()
