"""What runs in a worker: builds the context of one stage, runs it, commits what it left.

A job is a stage without its graph: what it needs is a list of addresses, so a
worker imports the files of its own stage and no others. Running a job twice does
no harm: whoever is second finds the artifact complete and does nothing.
"""

import importlib.metadata
import logging
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from m2mkd_ray.execution.context import Checkpoints, Made, Maker, StageContext
from m2mkd_ray.execution.stage import Metrics, Resources, Stage
from m2mkd_ray.execution.store import Progress, Store, now

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 1.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Where = Mapping[str, Any]
"""The place of a worker: host, pid, and with Ray node_id and actor_id."""


@dataclass(frozen=True)
class Job:
    """A stage as its worker sees it."""

    name: str
    key: str
    address: str
    of: str
    version: int
    run: Callable[[Any, StageContext], Metrics]
    config: BaseModel
    needs: Mapping[str, str]
    """Addresses of all that it reads, by role."""
    resources: Resources
    placement: BaseModel


def job(stage: Stage) -> Job:
    """The job of a stage."""
    return Job(
        name=stage.name,
        key=stage.key,
        address=stage.address,
        of=stage.of,
        version=stage.version,
        run=stage.run,
        config=stage.config,
        needs={role: need.address for role, need in stage.reads.items()},
        resources=stage.resources,
        placement=stage.placement,
    )


def here() -> dict[str, Any]:
    """The place of this process."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "node_id": None, "actor_id": None}


class WorkerContext:
    """The `StageContext` of a stage that runs in this process."""

    def __init__(self, job: Job, store: Store, out: Path) -> None:
        self.inputs: Mapping[str, Path] = {role: store.open(address) for role, address in job.needs.items()}
        self.input_manifests: Mapping[str, Mapping[str, Any]] = {
            role: store.manifest(address) for role, address in job.needs.items()
        }
        self.input_metrics: Mapping[str, Metrics] = {
            role: manifest["metrics"] for role, manifest in self.input_manifests.items()
        }
        self.out = out
        self.checkpoints: Checkpoints = store.checkpoints(job.address)
        self.durable = store.durable(job.address)
        self.resources = job.resources
        self.placement = job.placement
        self._store = store
        self._address = job.address
        self._next_report = 0.0
        self.progress: Progress | None = None
        self.is_shared = False

    def stream(self, key: str, maker: Maker, start: int, stop: int) -> Iterator[Made]:
        """See `StageContext`; alone in its process, it makes all of them itself."""
        make = maker()
        return (Made(make(step), is_own=True) for step in range(start, stop))

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Say how far the stage is; written at most once a second, but the last step always.

        Metrics that are not finite are left out: JSON has none, and a report must not end a stage.
        """
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.progress = Progress(step, total_steps, finite, time.time(), os.getpid(), socket.gethostname())
        if time.monotonic() < self._next_report and step != total_steps:
            return
        self._next_report = time.monotonic() + _REPORT_EVERY_S
        self._store.say_progress(self._address, self.progress)


def run_job(job: Job, store: Store, where: Where) -> Metrics:
    """Run a stage and commit its artifact, unless it is complete.

    Returns:
        What the stage returned, as the artifact's manifest has it.

    Raises:
        ArtifactError: an artifact that it needs is missing or spoilt.
        StoreError: the store cannot be written.
        Exception: whatever the stage raises.
    """
    if store.status(job.address).state == "complete":
        return store.manifest(job.address)["metrics"]
    with _threads(max(1, math.ceil(job.resources.cpus))):
        try:
            return _run(job, store, where)
        except Exception:
            # A worker that was taken for lost but lives may find its files gone under it when the other is done.
            if store.status(job.address).state == "complete":
                logger.info("%s was completed by another worker meanwhile", job.address)
                return store.manifest(job.address)["metrics"]
            raise


def _run(job: Job, store: Store, where: Where) -> Metrics:
    started, clock = now(), time.perf_counter()
    attempts = _begin_attempt(job, store, where, started)
    out = store.scratch(job.address)
    try:
        context = WorkerContext(job, store, out)
        metrics = job.run(job.config, context)
        manifest = {
            "format": 1,
            "name": job.name,
            "key": job.key,
            "of": job.of,
            "stage_version": job.version,
            "config": job.config.model_dump(mode="json"),
            "needs": dict(job.needs),
            "metrics": dict(metrics),
            "progress": None if context.progress is None else asdict(context.progress),
            "resources": job.resources.model_dump(mode="json"),
            "placement": job.placement.model_dump(mode="json"),
            "versions": versions(),
            "started": started,
            "ended": now(),
            "seconds": time.perf_counter() - clock,
            "where": dict(where),
            "attempts": [*attempts[:-1], {**attempts[-1], "ended": now(), "outcome": "COMPLETE"}],
        }
        return store.commit(job.address, out, manifest)
    finally:
        shutil.rmtree(out, ignore_errors=True)  # after a commit it is gone, or a copy


def _begin_attempt(job: Job, store: Store, where: Where, started: str) -> list[dict[str, Any]]:
    """Say in the store that an attempt began; one that never said its end was lost with its driver."""
    attempts = store.attempts(job.address)
    for attempt in attempts:
        if attempt["ended"] is None:
            attempt.update(ended=started, outcome="LOST", message="its end is not known")
    attempts.append({"started": started, "ended": None, "outcome": None, "message": "", "where": dict(where)})
    store.say_attempts(job.address, attempts)
    return attempts


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let numeric libraries use `count` threads, those imported already and those yet to come."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    torch = sys.modules.get("torch")
    torch_before = torch.get_num_threads() if torch else None
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(count)))
    if torch:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if torch:
            torch.set_num_threads(torch_before)


@cache
def versions() -> Mapping[str, str | None]:
    """Versions of what decides numbers, and the git commit of the package if it runs from a checkout."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("m2mkd_ray", "torch", "torchvision", "timm", "ray", "deepspeed", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    """The commit of the checkout that this file is in, with `+changes` if it differs from it; None if in none."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package that was installed into somebody's checkout is not tracked there.
    if not git("ls-files", "--error-unmatch", Path(__file__).name) or not (commit := git("rev-parse", "HEAD")):
        return None
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no", ".") else commit
