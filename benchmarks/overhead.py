"""Seconds from the launch of a pair to its first optimizer step, with a cold worker and with a warm one.

    python -m benchmarks.overhead --json FILE

Teacher and meta model of the recipe are trained briefly first, in an empty folder of
its own below --store; what they weigh is what matters here. Then pairs are run one at
a time: the first in a worker that has to be started, the others in the same worker.
Launch is the moment at which the executor submits the stage. Between it and the first
step lie the worker's start and imports, the reading of weights and images, and the
teacher hybrid's validation; `began_s` is the part until the stage itself begins.
"""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._run import TimedLauncher, parser, write
from m2mkd_ray.execution import Stage, Store, execute
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.pipeline import plan
from m2mkd_ray.recipe import override
from m2mkd_ray.recipes import find_recipe

BRIEF = ("meta.epochs=0.4", "meta.warmup_epochs=0", "pairs.epochs=0.4", "pairs.warmup_epochs=0", "baselines=[]")
BRIEF_TEACHER = "teacher={source: trained, phase: {epochs: 0.4, batch_size: 64, lr: 0.001}}"
PREWARM = ("m2mkd_ray.stages.incubate",)


def pair(recipe: str, settings: Sequence[str], number: int) -> Stage:
    """The first pair, of a temperature of its own, so that it is run although another one is complete."""
    settings = [BRIEF_TEACHER, *BRIEF, *settings, f"pairs.distill.temperature={1 + number / 100}"]
    chosen = override(find_recipe(recipe), settings)
    return next(stage for stage in plan(chosen) if stage.name == "pair-0")


def seconds(stage: Stage, store: Store, launcher: TimedLauncher) -> dict[str, float]:
    """From launch to the beginning of the stage and to its first step."""
    execute([stage], store, launcher).raise_for_failures()
    manifest: Mapping[str, Any] = store.manifest(stage.address)
    launched = launcher.submitted[stage.address]
    return {
        "began_s": datetime.fromisoformat(manifest["started"]).timestamp() - launched,
        "first_step_s": manifest["metrics"]["first_step_at"] - launched,
    }


def main() -> None:
    """Run, print the table, write the numbers."""
    options = parser(__doc__)
    options.add_argument("--cold", type=int, default=3, help="workers to start; default: 3")
    options.add_argument("--warm", type=int, default=3, help="further pairs in each of them; default: 3")
    arguments = options.parse_args()
    Path(arguments.store).mkdir(parents=True, exist_ok=True)
    cold: list[dict[str, float]] = []
    warm: list[dict[str, float]] = []
    first = RayLauncher(num_cpus=2)  # holds the Ray that the launchers below only use
    try:
        with tempfile.TemporaryDirectory(dir=arguments.store, prefix="overhead-") as folder:
            store = Store(folder)
            needs = list(pair(arguments.recipe, arguments.settings, 0).reads.values())
            execute(needs, store, first).raise_for_failures()
            for number in range(arguments.cold * (1 + arguments.warm)):
                if number % (1 + arguments.warm) == 0:
                    launcher = TimedLauncher(RayLauncher(prewarm=PREWARM))
                found = seconds(pair(arguments.recipe, arguments.settings, number), store, launcher)
                (warm if number % (1 + arguments.warm) else cold).append(found)
                if number % (1 + arguments.warm) == arguments.warm:
                    launcher.close()
    finally:
        first.close()
    results: dict[str, Any] = {}
    table = Table("worker", "until it begins", "until its first step", "first steps")
    for name, runs in (("cold", cold), ("warm", warm)):
        results[f"{name}_s"] = statistics.median(run["first_step_s"] for run in runs)
        results[f"{name}_began_s"] = statistics.median(run["began_s"] for run in runs)
        results[f"{name}_all_s"] = [run["first_step_s"] for run in runs]
        each = ", ".join(f"{run['first_step_s']:.2f}" for run in runs)
        table.add_row(name, f"{results[f'{name}_began_s']:.2f} s", f"{results[f'{name}_s']:.2f} s", each)
    Console().print(table)
    write(arguments.json, {"recipe": arguments.recipe, **results})


if __name__ == "__main__":
    main()
