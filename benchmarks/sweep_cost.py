"""B7: what a sweep of eight trials costs in a cohort, against the same trials each on its own.

    python -m benchmarks.sweep_cost --json sweep_cost.json

Both ways are what `m2mkd sweep` does: Ray Tune's trials, the desk, an open run of the executor; once with eight seats
a worker, once with one, and no teacher's logits kept. One worker at a time with one thread, each worker's process for
one seat only. Trials are those of one pair of a V-MoE an eighth as wide as the paper's, on images that are decoded
once, as in `benchmarks/cohorts.py` (`compute`): temperature, alpha and learning rate vary. What is measured:

    ratio             CPU seconds of the workers' processes from when they took up a training, together by separately
    ratio_with_start  with the start of these processes, of which a cohort has one
    teacher_calls, decodes, flops
                      as the trainings counted them, beside the sweep's own prediction (`m2mkd sweep --dry-run`), which
                      must be met; and the weights at the end must be the same bits both ways

Ray Tune's own processes are idle, and not counted. About six minutes on two cores.
"""

import argparse
import hashlib
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._run import write
from benchmarks.cohorts import KINDS, cpu_of, once, settings_of
from benchmarks.decodes import jpegs
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.execution.stage import Stage, in_order
from m2mkd_ray.execution.store import Store
from m2mkd_ray.recipe import typed
from m2mkd_ray.sweeps import tuning
from m2mkd_ray.sweeps.cost import Cost
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.expect import Expected, expect
from m2mkd_ray.sweeps.points import base
from m2mkd_ray.sweeps.sweep import Budget, GridSearch, OnePair, Sweep

SEATS = {"together": 8, "separately": 1}
SPACE = {
    "pairs.distill.temperature": "grid([1, 4])",
    "pairs.distill.alpha": "grid([0.3, 0.9])",
    "pairs.lr": "grid([0.0005, 0.001])",
}
COUNTED = ("flops", "teacher_calls", "decodes")


@dataclass(frozen=True)
class Ran:
    """What the trials of a sweep cost and left."""

    busy_s: float
    """CPU seconds of all workers' processes, from when they took up a training."""
    cpu_s: float
    """The same from their start."""
    num_processes: int
    counted: Cost
    values: list[float]
    """Of each trial, in the order of the plan."""
    bits: list[str]
    """The trained modules, likewise."""


def main() -> None:
    """Run the sweep both ways, print the table, write the numbers."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="m2-") as scratch:
        folder = Path(scratch)
        jpegs(folder, arguments.rows)
        sweeps = {
            way: sweep_of(seats, folder / "data", arguments.settings, arguments.epochs, arguments.index)
            for way, seats in SEATS.items()
        }
        found = measured(sweeps, folder, arguments.repeats)
    table = Table(
        "eight trials", "CPU s", "with start", "workers", "teacher, images", "predicted", "decodes", "predicted"
    )
    for way, of in found["ways"].items():
        counted, predicted = of["counted"], of["predicted"]
        table.add_row(
            way,
            f"{statistics.median(of['busy_s']):.1f}",
            f"{statistics.median(of['cpu_s']):.1f}",
            str(of["num_processes"]),
            *(f"{numbers[name]:g}" for name in ("teacher_calls", "decodes") for numbers in (counted, predicted)),
        )
    Console().print(table)
    Console().print(f"together ÷ separately: {found['ratio']:.3f}, with start {found['ratio_with_start']:.3f}")
    write(arguments.json, {**found, "rows": arguments.rows, "epochs": arguments.epochs, "index": arguments.index})


def sweep_of(seats: int, data_root: Path, settings: Sequence[str], epochs: float, index: int) -> Sweep:
    """The sweep, with so many seats a worker; how many decides no result, and is not in its key."""
    return Sweep.model_validate(
        {
            "name": "cost",
            "title": "What sharing saves",
            "recipe": "demo",
            "settings": dict(map(typed, [*settings_of(KINDS["compute"], data_root, epochs), *settings])),
            "level": OnePair(index=index),
            "space": SPACE,
            "searcher": GridSearch(),
            "budget": Budget(trials=8),
            "cohort": seats,
        }
    )


def measured(sweeps: Mapping[str, Sweep], folder: Path, repeats: int) -> dict[str, Any]:
    """The sweep both ways, in turns, from the same teacher and meta model."""
    prepared = Store(str(folder / "prepared"))
    plans = {way: expect(sweep, base(sweep), prepared) for way, sweep in sweeps.items()}
    shared = plans["together"].shared
    once(shared, prepared, RayLauncher(num_cpus=2), None)
    ran: dict[str, list[Ran]] = {way: [] for way in sweeps}
    for repeat in range(repeats):
        for way, sweep in sweeps.items():
            store = Store(str(folder / f"{way}-{repeat}"))
            lend(prepared, store, shared)
            ran[way].append(run(sweep, store))
    together, separately = ran["together"], ran["separately"]
    for one, other in zip(together, separately, strict=True):
        assert (one.bits, one.values) == (other.bits, other.values), "trials of a cohort gave other results"
    for way, runs in ran.items():
        for one in runs:
            assert is_as_predicted(one.counted, plans[way]), f"{way}: {one.counted}, predicted: {plans[way].together}"
    ratios = [one.busy_s / other.busy_s for one, other in zip(together, separately, strict=True)]
    with_start = [one.cpu_s / other.cpu_s for one, other in zip(together, separately, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_with_start": statistics.median(with_start),
        "ratios": ratios,
        "predicted_flops_ratio": plans["together"].share,
        "trials": len(together[0].bits),
        "ways": {way: _numbers(runs, plans[way]) for way, runs in ran.items()},
    }


def lend(source: Store, target: Store, stages: Sequence[Stage]) -> None:
    """Let a store have what trials share, by links."""
    Path(target.root).mkdir(parents=True)
    for stage in in_order(stages):
        (Path(target.root) / stage.address).symlink_to(Path(source.root) / stage.address)


def run(sweep: Sweep, store: Store) -> Ran:
    """Run a sweep on a Ray of one core, each worker's process for one seat only."""
    launcher = RayLauncher(num_cpus=1, keep_idle_s=0)
    try:
        results = tuning.run(sweep, store, launcher)
    finally:
        launcher.close()
    numbers = results.numbers
    trials = sorted(results.trials, key=lambda trial: numbers[trial.name])
    assert [dict(trial.point) for trial in trials] == drawn(sweep), "a trial has not begun"
    stages = [stage for trial in trials for stage in trial.stages]
    cpu_s, busy_s, num_processes = cpu_of([store.manifest(stage.address) for stage in stages])
    files = [store.open(stage.address) / "module.safetensors" for stage in stages]
    return Ran(
        busy_s=busy_s,
        cpu_s=cpu_s,
        num_processes=num_processes,
        counted=Cost(*(sum(stage.counters.get(name, 0.0) for stage in stages) for name in COUNTED)),
        values=[trial.history[-1][1] for trial in trials],
        bits=[hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
    )


def is_as_predicted(counted: Cost, plan: Expected) -> bool:
    """Whether trials that all came to their ends counted what their sweep's plan says."""
    assert plan.together is not None
    pairs = zip(asdict(counted).values(), asdict(plan.together).values(), strict=True)
    return all(math.isclose(one, other, rel_tol=1e-9) for one, other in pairs)


def _numbers(runs: Sequence[Ran], plan: Expected) -> dict[str, Any]:
    assert plan.together is not None
    return {
        "busy_s": [one.busy_s for one in runs],
        "cpu_s": [one.cpu_s for one in runs],
        "num_processes": runs[0].num_processes,
        "cohorts": list(plan.cohorts),
        "counted": asdict(runs[0].counted),
        "predicted": asdict(plan.together),
    }


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--set", action="append", default=[], metavar="a.b=value", dest="settings")
    options.add_argument("--rows", type=int, default=320, help="images (default: 320)")
    options.add_argument("--epochs", type=float, default=2, help="of each trial (default: 2)")
    options.add_argument("--repeats", type=int, default=1, help="default: 1")
    options.add_argument("--index", type=int, default=2, help="pair of which there are trials (default: 2)")
    options.add_argument("--store", help="without effect: for `make bench`")
    options.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    return options.parse_args()


if __name__ == "__main__":
    main()
