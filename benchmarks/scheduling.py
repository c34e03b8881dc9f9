"""What scheduling costs: fake work through the real executor, Ray and store, against the bound of any schedule.

    python -m benchmarks.scheduling --json FILE

Stages sleep for an exact while (2 to 18 tenths of --seconds) and keep checkpoints, on
fake nodes that hold one stage each; five in a hundred have their worker killed
(SIGKILL) in mid-stage. The makespan is divided by what no schedule can be faster than:
all work over all speeds, or the longest stage on the fastest node.

The fake nodes of a setting are the cores of up to --raylets real raylets, since 64
raylets with their agents do not fit two cores; on mixed speeds all cores of a raylet
have one speed, and the planner places the stages. Workers are started before the clock
(`start_s` tells how long it took); those of the killed ones are started within. Ray
runs workers at niceness 15, which stands for nothing here, where 64 of them share what
on a cluster are 64 machines: it is set to 0.
"""

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from benchmarks._fake import Machine, naps, roll_call
from benchmarks._run import write
from m2mkd_ray.execution import Event, Placer, Resources, Stage, StageStarted, Store, execute
from m2mkd_ray.execution.planning.devices import device_type
from m2mkd_ray.execution.planning.works import Work
from m2mkd_ray.execution.ray_launcher import RayLauncher

SETTINGS = ((4, 1), (16, 4), (64, 16), (256, 32), (512, 64))
"""Stages and fake nodes."""
KILLED = 0.05
MIXED = (2.0, 1.0, 1.0, 0.5)
"""Speeds of raylets in turn, where they are mixed."""
COLUMNS = ("start_s", "makespan_s", "bound_s", "ratio", "killed", "driver_cpu_s")


class Killer:
    """Kills the workers of some stages, each once, at a moment within its nap."""

    def __init__(self, stages: Sequence[Stage], speeds: Mapping[str, float], draw: random.Random) -> None:
        victims = draw.sample(list(stages), round(KILLED * len(stages)))
        self._after = {
            stage.address: draw.uniform(0.2, 0.8) * stage.config.model_dump()["seconds"] for stage in victims
        }
        self._speeds = speeds
        self.killed = 0

    def __call__(self, event: Event) -> None:
        """Set the clock of a victim that begins."""
        if isinstance(event, StageStarted) and (after := self._after.pop(event.stage.address, None)) is not None:
            speed = self._speeds.get(event.where["node_id"], 1.0)
            timer = threading.Timer(after / speed, self._kill, [event.where["pid"]])
            timer.daemon = True
            timer.start()

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.killed += 1


def measure(stages: int, nodes: int, seconds: float, raylets: int, is_mixed: bool, seed: int) -> dict[str, Any]:
    """The figures of one setting."""
    draw = random.Random(seed)
    raylets = min(raylets, nodes)
    with tempfile.TemporaryDirectory(prefix="m2s-", ignore_cleanup_errors=True) as folder:
        head = {
            "num_cpus": nodes // raylets,
            "include_dashboard": False,
            "temp_dir": f"{folder}/ray",
            "_system_config": {"worker_niceness": 0},
            "labels": _labels(0, is_mixed),
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for number in range(1, raylets):
            cores = (nodes * (number + 1)) // raylets - (nodes * number) // raylets
            cluster.add_node(num_cpus=cores, labels=_labels(number, is_mixed))
        cluster.wait_for_nodes()
        launcher = RayLauncher(cluster.address, keep_idle_s=600.0)
        try:
            speeds = {}
            if is_mixed:
                speeds = {node.id: float(device_type(node, Resources())) for node in launcher.nodes()}
            lengths = [draw.uniform(0.2, 1.8) * seconds for _ in range(stages)]
            started = time.perf_counter()
            execute(roll_call(nodes), Store(f"{folder}/roll"), launcher).raise_for_failures()
            start_s = time.perf_counter() - started
            plan = naps(lengths, Machine(speeds=speeds))
            killer, place = Killer(plan, speeds, draw), _planner(plan, lengths) if is_mixed else None
            started, cpu = time.perf_counter(), time.process_time()
            execute(plan, Store(f"{folder}/store"), launcher, on_event=killer, place=place).raise_for_failures()
            makespan, driver_cpu = time.perf_counter() - started, time.process_time() - cpu
            total_speed = sum(speeds.get(node.id, 1.0) * node.resources["CPU"] for node in launcher.nodes())
            bound = max(sum(lengths) / total_speed, max(lengths) / max(speeds.values(), default=1.0))
        finally:
            launcher.close()
            cluster.shutdown()
    return {
        "start_s": start_s,
        "makespan_s": makespan,
        "bound_s": bound,
        "ratio": makespan / bound,
        "killed": killer.killed,
        "driver_cpu_s": driver_cpu,
    }


def _labels(raylet: int, is_mixed: bool) -> dict[str, str]:
    """Of a raylet: its speed is the type of its devices."""
    return {"ray.io/node-group": str(MIXED[raylet % len(MIXED)])} if is_mixed else {}


def _planner(plan: Sequence[Stage], lengths: Sequence[float]) -> Placer:
    """The planner, which knows how long each stage takes on a node of each speed."""
    from m2mkd_ray.execution.planning.planner import Planner

    return Planner(
        {
            stage.address: Work(stage.name, {str(speed): length / speed for speed in MIXED})
            for stage, length in zip(plan, lengths, strict=True)
        }
    )


def main() -> None:
    """Measure every setting, print the table, write the numbers."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=20.0, help="mean length of a stage; default: 20")
    options.add_argument("--raylets", type=int, default=8, help="most real raylets; default: 8")
    options.add_argument("--only", metavar="STAGES,NODES", help="one setting instead of all")
    options.add_argument("--mixed", action="store_true", help=f"raylets of speeds {MIXED} in turn")
    options.add_argument("--seed", type=int, default=0, help="of lengths and kills; default: 0")
    options.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    arguments = options.parse_args()
    chosen = [tuple(map(int, arguments.only.split(",")))] if arguments.only else SETTINGS
    table = Table("stages", "nodes", *COLUMNS)
    results: dict[str, Any] = {}
    for stages, nodes in chosen:
        found = measure(stages, nodes, arguments.seconds, arguments.raylets, arguments.mixed, arguments.seed)
        table.add_row(str(stages), str(nodes), *(f"{found[column]:.3f}" for column in COLUMNS))
        name = f"fake_{stages}_{nodes}" + ("_mixed" if arguments.mixed else "")
        results |= {f"{name}_{column}": value for column, value in found.items()}
    Console().print(table)
    about = {"stage_seconds_mean": arguments.seconds, "raylets": arguments.raylets, "killed_share": KILLED}
    write(arguments.json, {**about, **results})


if __name__ == "__main__":
    main()
