"""What runs in a worker: builds the context of each stage, runs it, or several together, commits what they left.

Running a job twice does no harm: whoever is second finds the artifact complete and
does nothing.
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
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

from m2mkd_ray.execution.cohort import Left, Member, Withdrawn
from m2mkd_ray.execution.context import Checkpoints, Made, Maker, StageContext
from m2mkd_ray.execution.job import Job, Where
from m2mkd_ray.execution.reports import End, Finished, raised
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.execution.store import Progress, Store, now

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 1.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Around(Protocol):
    """What is around a worker that is one of several on its node."""

    def stream(self, key: str, maker: Maker, start: int, stop: int, consumer: str, workers: int) -> Iterator[Made]:
        """See `StageContext.stream`; `consumer` says who asks, for people."""

    def has_notice(self) -> bool:
        """See `StageContext.has_notice`."""

    def report(self, job: Job, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Tell whoever watches the node."""


class WorkerContext:
    """The `StageContext` of a stage that runs in this process; `around` is None where that is alone."""

    def __init__(
        self, job: Job, store: Store, out: Path, around: Around | None = None, *, may_leave: bool = True
    ) -> None:
        """`may_leave`: whether `report` may end what reports; of several ranks none leaves alone."""
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
        self._job, self._store = job, store
        self._address = job.address
        self._may_leave = may_leave
        self._next_report = 0.0
        self.progress: Progress | None = None
        self.is_shared = around is not None
        self._around = around

    def stream(self, key: str, maker: Maker, start: int, stop: int, workers: int = 0) -> Iterator[Made]:
        """See `StageContext`."""
        if self._around is not None:
            return self._around.stream(key, maker, start, stop, self._address, workers)
        make = maker()
        return (Made(make(step), is_own=True) for step in range(start, stop))

    def elsewhere(self) -> Callable[[], StageContext]:
        """See `StageContext`."""
        return partial(_context_elsewhere, self._job, self._store)

    def has_notice(self) -> bool:
        """See `StageContext`; never where this process is alone."""
        return self._around is not None and self._around.has_notice()

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], landmarks: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """Say how far the stage is; written at most once a second, but the last step and landmarks always.

        Metrics that are not finite are left out: JSON has none, and a report must not end a stage.

        Raises:
            Withdrawn: see `StageContext`. Looked for with every report that is written but the last step's.
        """
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        is_landmark = len(landmarks) > (0 if self.progress is None else len(self.progress.landmarks))
        self.progress = Progress(
            step, total_steps, finite, time.time(), os.getpid(), socket.gethostname(), tuple(landmarks)
        )
        if self._around is not None:
            self._around.report(self._job, step, total_steps, finite)
        if time.monotonic() < self._next_report and step != total_steps and not is_landmark:
            return
        self._next_report = time.monotonic() + _REPORT_EVERY_S
        self._store.say_progress(self._address, self.progress)
        if self._may_leave and step != total_steps and self._store.is_withdrawn(self._address):
            raise Withdrawn(f"{self._address} is not wanted any more")


def _context_elsewhere(job: Job, store: Store) -> StageContext:
    out = store.scratch(job.address)
    context = WorkerContext(job, store, out, may_leave=False)
    weakref.finalize(context, shutil.rmtree, out, ignore_errors=True)  # at the process's end at the latest
    return context


def run_job(job: Job, store: Store, where: Where, around: Around | None = None) -> Metrics:
    """Run a stage and commit its artifact, unless it is complete.

    Returns:
        What the stage returned, as the artifact's manifest has it.

    Raises:
        ArtifactError: an artifact that it needs is missing or spoilt.
        StoreError: the store cannot be written.
        Exception: whatever the stage raises.
    """
    if (metrics := _complete(job, store)) is not None:
        return metrics
    with _threads(max(1, math.ceil(job.resources.cpus))):
        try:
            attempt = _Attempt(job, store, where, around)
            try:
                return attempt.commit(job.run(job.config, attempt.context))
            finally:
                attempt.discard()
        except Exception:
            # A worker that was taken for lost but lives may find its files gone under it when the other is done.
            if (metrics := _of_a_faster_one(job, store)) is None:
                raise
            return metrics


def run_cohort(
    jobs: Sequence[Job], store: Store, where: Where, around: Around | None = None
) -> Generator[End, None, None]:
    """Run several stages together, commit each as it leaves, and tell how each ended, once.

    A member that fails leaves the others at work; what the function that runs them raises ends all that have not
    left. A member whose artifact is complete already takes no part. One job alone is run as `run_job` does.
    """
    if len(jobs) == 1:
        yield _told(jobs[0], store, lambda: run_job(jobs[0], store, where, around))
        return
    members = []
    for job in jobs:
        if (metrics := _complete(job, store)) is None:
            members.append(job)
        else:
            yield Finished(job.address, metrics)
    if not members:
        return
    if len(members) > 1:
        where = {**where, "cohort": [job.address for job in members]}
    with _threads(max(1, math.ceil(members[0].resources.cpus))):
        yield from _run_together(members, store, where, around)


def _run_together(jobs: Sequence[Job], store: Store, where: Where, around: Around | None) -> Iterator[End]:
    attempts: list[_Attempt] = []
    try:
        for job in jobs:
            try:
                attempts.append(_Attempt(job, store, where, around))
            except Exception as error:
                yield raised(job.address, error)
        if attempts:
            yield from _each_that_leaves(attempts, store)
    finally:
        for attempt in attempts:
            attempt.discard()


def _each_that_leaves(attempts: Sequence["_Attempt"], store: Store) -> Iterator[End]:
    """Go through a cohort to its end."""
    inside = dict(enumerate(attempts))
    together = attempts[0].job.together
    try:
        if together is None:
            raise TypeError(f"{attempts[0].job.name} cannot run in a cohort: its stage has no `together`")
        for left in together([Member(attempt.job.config, attempt.context) for attempt in attempts]):
            if (attempt := inside.get(left.place)) is None:
                raise ValueError(f"the function that runs the cohort told twice of place {left.place}, or of none")
            end = _told(attempt.job, store, partial(_result, attempt, left))
            del inside[left.place]  # not before there is something to tell of it
            yield end
            attempt.discard()
        if inside:
            raise RuntimeError("the function that runs the cohort ended without a word about this member")
    except (Exception, SystemExit) as error:
        for attempt in inside.values():
            yield raised(attempt.job.address, error)


def _result(attempt: "_Attempt", left: Left) -> Metrics:
    """Commit what a member left behind, or raise what stopped it."""
    if left.error is not None:
        raise left.error
    if left.metrics is None:
        raise TypeError(f"{attempt.job.name} left its cohort with neither metrics nor an error")
    return attempt.commit(left.metrics)


def _told(job: Job, store: Store, result: Callable[[], Metrics]) -> End:
    """What a job returns or raises, as a report."""
    try:
        return Finished(job.address, result())
    except (Exception, SystemExit) as error:
        metrics = _of_a_faster_one(job, store)
        return raised(job.address, error) if metrics is None else Finished(job.address, metrics)


def _complete(job: Job, store: Store) -> Metrics | None:
    """The metrics of a job's artifact, None if it is not complete."""
    status = store.status(job.address)
    return None if status.state != "complete" or status.manifest is None else status.manifest["metrics"]


def _of_a_faster_one(job: Job, store: Store) -> Metrics | None:
    """After an error: the metrics of the artifact that another worker has made meanwhile.

    None if there is none, or if the store cannot be read: then the error is what there is to tell.
    """
    try:
        metrics = _complete(job, store)
    except Exception:
        logger.warning("Whether %s is complete cannot be read", job.address, exc_info=True)
        return None
    if metrics is not None:
        logger.info("%s was completed by another worker meanwhile", job.address)
    return metrics


class _Attempt:
    """One try at a stage: said in the store when it begins, with a folder of its own until it is committed."""

    def __init__(self, job: Job, store: Store, where: Where, around: Around | None) -> None:
        self.job, self._store, self._where = job, store, where
        self._started, self._clock, self._cpu_clock = now(), time.perf_counter(), time.process_time()
        self._attempts = _begin_attempt(job, store, where, self._started)
        store.forget_scratch(job.address)  # of an attempt that was killed
        self._out = store.scratch(job.address)
        try:
            self.context = WorkerContext(job, store, self._out, around)
        except BaseException:
            self.discard()
            raise

    def commit(self, metrics: Metrics) -> Metrics:
        """Make what the stage left its artifact; gives the metrics of the artifact that is now there."""
        job, ended, progress = self.job, now(), self.context.progress
        manifest = {
            "format": 1,
            "name": job.name,
            "key": job.key,
            "of": job.of,
            "stage_version": job.version,
            "config": job.config.model_dump(mode="json"),
            "needs": dict(job.needs),
            "metrics": dict(metrics),
            "progress": None if progress is None else asdict(progress),
            "resources": job.resources.model_dump(mode="json"),
            "placement": job.placement.model_dump(mode="json"),
            "versions": versions(),
            "started": self._started,
            "ended": ended,
            "seconds": time.perf_counter() - self._clock,
            "cpu_seconds": {"before": self._cpu_clock, "during": time.process_time() - self._cpu_clock},
            "where": dict(self._where),
            "attempts": [*self._attempts[:-1], {**self._attempts[-1], "ended": ended, "outcome": "COMPLETE"}],
        }
        return self._store.commit(job.address, self._out, manifest)

    def discard(self) -> None:
        """Delete what is left of its folder: after a commit it is gone, or a copy."""
        shutil.rmtree(self._out, ignore_errors=True)


def _begin_attempt(job: Job, store: Store, where: Where, started: str) -> list[dict[str, Any]]:
    """Say in the store that an attempt began; one that never said its end was lost with its driver."""
    attempts = store.attempts(job.address)
    for attempt in attempts:
        if attempt["ended"] is None:
            lost = store.lost_steps(job.address, attempt["started"])
            attempt.update(ended=started, outcome="LOST", message="its end is not known", lost_steps=lost)
    begun = {"started": started, "ended": None, "outcome": None, "message": "", "where": dict(where)}
    attempts.append(begun | {"resources": job.resources.model_dump(mode="json")})
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
