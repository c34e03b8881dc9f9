"""What each stage of a run costs: seconds, images a second, and the overhead from launch to first step.

    python -m benchmarks.stages --recipe demo --json stages.json

Runs the recipe in an empty folder of its own below --store, so every stage is run.
Launch is the moment at which the executor submits a stage; from there to the first
optimizer step lie the wait for a free core, the start of a worker, its imports, and
the reading of weights and images. The wait is told apart: it ends when the worker
begins, and a stage with a worker of its own cannot begin before one is free.
"""

import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._run import parser, run, write
from m2mkd_ray.execution.store import Store
from m2mkd_ray.recipe import override
from m2mkd_ray.recipes import find_recipe

COLUMNS = ("seconds", "images_per_s", "data_wait", "queued_s", "to_first_step_s")


def main() -> None:
    """Run, print the table, write the numbers."""
    arguments = parser(__doc__).parse_args()
    recipe = override(find_recipe(arguments.recipe), arguments.settings)
    Path(arguments.store).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.store, prefix="stages-") as folder:
        manifests, submitted, seconds = run(recipe, Store(folder), arguments.launcher)
    rows = [row(manifest, submitted[address]) for address, manifest in manifests.items()]
    busy = sum(entry["seconds"] for entry in rows)
    table = Table("stage", "recipe", *COLUMNS, title=f"{recipe.name}: {seconds:.0f} s, stages {busy:.0f} s")
    for entry in rows:
        table.add_row(entry["stage"], entry["recipe"], *(shown(entry[column]) for column in COLUMNS))
    Console().print(table)
    write(arguments.json, {"recipe": recipe.name, "seconds": seconds, "stage_seconds": busy, "stages": rows})


def row(manifest: Mapping[str, Any], submitted: float) -> dict[str, Any]:
    """One line of the table."""
    metrics, began = manifest["metrics"], datetime.fromisoformat(manifest["started"]).timestamp()
    began = metrics.get("ranks_began_at") or began
    first_step = metrics.get("first_step_at")
    return {
        "stage": manifest["name"],
        "recipe": manifest["of"],
        "seconds": datetime.fromisoformat(manifest["ended"]).timestamp() - began,
        "images_per_s": metrics.get("images_per_s"),
        "data_wait": metrics.get("data_wait"),
        "queued_s": began - submitted,
        "to_first_step_s": None if first_step is None else first_step - began,
    }


def shown(value: float | None) -> str:
    """A number for the table; nothing for None."""
    return "" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
