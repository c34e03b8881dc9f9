"""Running a recipe for a measurement, with the moment at which each stage was submitted."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2mkd_ray.execution.executor import execute
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.job import Job
from m2mkd_ray.execution.launcher import Launcher, LocalLauncher, Report
from m2mkd_ray.execution.stage import Resources, Stage
from m2mkd_ray.execution.store import Store
from m2mkd_ray.execution.worker import versions
from m2mkd_ray.pipeline import plan
from m2mkd_ray.recipe import Recipe


class TimedLauncher:
    """A launcher that remembers when each stage was submitted."""

    def __init__(self, inner: Launcher) -> None:
        self.inner = inner
        self.runs_in_process = inner.runs_in_process
        self.submitted: dict[str, float] = {}

    def submit(
        self,
        jobs: Sequence[Job],
        store: Store,
        node: str | None = None,
        resources: Resources | None = None,
        *,
        goes_first: bool = False,
    ) -> None:
        """As the launcher inside."""
        self.submitted |= {job.address: time.time() for job in jobs}
        self.inner.submit(jobs, store, node, resources, goes_first=goes_first)

    def poll(self, timeout_s: float) -> list[Report]:
        """As the launcher inside."""
        return self.inner.poll(timeout_s)

    def kill(self, address: str) -> set[str]:
        """As the launcher inside."""
        return self.inner.kill(address)

    def recall(self, addresses: Collection[str]) -> set[str]:
        """As the launcher inside."""
        return self.inner.recall(addresses)

    def nodes(self) -> list[Node]:
        """As the launcher inside."""
        return self.inner.nodes()

    def may_grow(self) -> bool:
        """As the launcher inside."""
        return self.inner.may_grow()

    def most_nodes(self) -> list[Node]:
        """As the launcher inside."""
        return self.inner.most_nodes()

    def problems(self, stages: Sequence[Stage], store: Store) -> list[str]:
        """As the launcher inside."""
        return self.inner.problems(stages, store)

    def close(self) -> None:
        """As the launcher inside."""
        self.inner.close()


def run(recipe: Recipe, store: Store, launcher: str) -> tuple[dict[str, Mapping[str, Any]], dict[str, float], float]:
    """Run what is not complete of a recipe.

    Returns:
        Manifests by address, the time at which each stage that ran now was submitted, and the seconds of it all.
    """
    stages = plan(recipe)
    if launcher == "ray":
        from m2mkd_ray.execution.ray_launcher import RayLauncher

        timed = TimedLauncher(RayLauncher())
    else:
        timed = TimedLauncher(LocalLauncher())
    started = time.perf_counter()
    try:
        execute(stages, store, timed).raise_for_failures()
    finally:
        timed.close()
    seconds = time.perf_counter() - started
    return {stage.address: store.manifest(stage.address) for stage in stages}, timed.submitted, seconds


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--recipe", default="demo", help="default: demo")
    options.add_argument("--set", action="append", default=[], metavar="a.b=value", dest="settings")
    options.add_argument("--store", default="runs/benchmarks", help="default: runs/benchmarks")
    options.add_argument("--launcher", choices=("ray", "local"), default="ray")
    options.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    return options


def write(file: Path | None, results: Mapping[str, Any]) -> None:
    """Write the numbers with the command and the versions that made them."""
    if file is None:
        return
    about = {
        "command": f"python -m {Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}",
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "versions": dict(versions()),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**about, **results}, indent=1) + "\n")
