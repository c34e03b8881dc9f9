"""Speed-up of the module stage over numbers of workers: real pairs, real images.

    python -m benchmarks.scaling --recipe demo --workers 1 2 --json scaling.json

Everything before the pairs is run once, into a store of its own below --store. Then the
pairs alone are run with each number of workers, in turns, --repeats times: every time in
a copy of that store, on a Ray of as many cores, one thread a worker. The time is that of
`execute`, from the look into the store to the last artifact; Ray is up and its workers have
trained pairs of a few steps before (`--cold`: not), as earlier stages of a run leave them.
The bound is what the pairs of that very run took, put together on so many workers.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks._run import parser, write
from m2mkd_ray.execution.executor import execute
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.execution.store import Store
from m2mkd_ray.pipeline import plan
from m2mkd_ray.recipe import Recipe, override
from m2mkd_ray.recipes import find_recipe

PREPARED = ("data", "meta", "split")


def main() -> None:
    """Prepare, run the pairs with each number of workers, print the table, write the numbers."""
    options = parser(__doc__)
    options.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    options.add_argument("--repeats", type=int, default=3, help="default: 3")
    options.add_argument("--cold", action="store_true", help="do not warm the workers up")
    arguments = options.parse_args()
    recipe = override(find_recipe(arguments.recipe), [*arguments.settings, "baselines=[]"])
    pairs = [f"pair-{pair.index}" for pair in recipe.blueprint.pairs]
    Path(arguments.store).mkdir(parents=True, exist_ok=True)
    seconds: dict[int, list[float]] = {workers: [] for workers in arguments.workers}
    bounds: dict[int, list[float]] = {workers: [] for workers in arguments.workers}
    with tempfile.TemporaryDirectory(dir=arguments.store, prefix="scaling-") as folder:
        prepared = Path(folder) / "prepared"
        prepare(recipe, Store(str(prepared)), max(arguments.workers))
        for repeat in range(arguments.repeats):
            for workers in arguments.workers:
                store = Path(folder) / f"{workers}-{repeat}"
                shutil.copytree(prepared, store)
                took, each = run_pairs(recipe, Store(str(store)), pairs, workers, warm=not arguments.cold)
                seconds[workers].append(took)
                bounds[workers].append(max(sum(each) / workers, max(each)))
                shutil.rmtree(store)
    rows = [row(workers, seconds, bounds) for workers in arguments.workers]
    print_rows(recipe.name, rows)
    speed_up = {f"speed_up_{entry['workers']}": entry["speed_up"] for entry in rows}
    write(arguments.json, {"recipe": recipe.name, "repeats": arguments.repeats, **speed_up, "workers": rows})


def prepare(recipe: Recipe, store: Store, num_cpus: int) -> None:
    """Run what the pairs read."""
    launcher = RayLauncher(num_cpus=num_cpus)
    try:
        execute(plan(recipe), store, launcher, until=PREPARED).raise_for_failures()
    finally:
        launcher.close()


def run_pairs(
    recipe: Recipe, store: Store, pairs: list[str], workers: int, *, warm: bool
) -> tuple[float, list[float]]:
    """Seconds of all pairs, and of each in its worker."""
    launcher = RayLauncher(num_cpus=workers)
    try:
        if warm:
            short = override(recipe, ["pairs.epochs=0.05", "pairs.warmup_epochs=0"])
            execute(plan(short), store, launcher, until=pairs).raise_for_failures()
        began = time.perf_counter()
        outcome = execute(plan(recipe), store, launcher, until=pairs)
        took = time.perf_counter() - began
        outcome.raise_for_failures()
    finally:
        launcher.close()
    return took, [done.seconds for done in outcome.complete if done.stage.name in pairs]


def row(workers: int, seconds: dict[int, list[float]], bounds: dict[int, list[float]]) -> dict[str, object]:
    """One line: medians, and the speed-up of each repeat against the first number of workers."""
    first = next(iter(seconds.values()))
    gains = [alone / here for alone, here in zip(first, seconds[workers], strict=True)]
    over = [took / bound for took, bound in zip(seconds[workers], bounds[workers], strict=True)]
    return {
        "workers": workers,
        "seconds": statistics.median(seconds[workers]),
        "speed_up": statistics.median(gains),
        "speed_ups": gains,
        "over_bound": statistics.median(over),
    }


def print_rows(recipe: str, rows: list[dict[str, object]]) -> None:
    """The table."""
    table = Table("workers", "seconds", "speed-up", "of each repeat", "÷ bound", title=f"pairs of {recipe}")
    for entry in rows:
        gains = entry["speed_ups"]
        assert isinstance(gains, list)
        table.add_row(
            str(entry["workers"]),
            f"{entry['seconds']:.1f}",
            f"{entry['speed_up']:.2f}",
            ", ".join(f"{gain:.2f}" for gain in gains),
            f"{entry['over_bound']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
