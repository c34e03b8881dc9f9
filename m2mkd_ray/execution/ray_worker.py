"""The actor in which stages run, one seat after another. It belongs to no stage until it is given one."""

import gc
import importlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import ray
import ray.cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2mkd_ray.execution.context import Made, Maker
from m2mkd_ray.execution.feasibility import is_spot, label_selector, node_group
from m2mkd_ray.execution.job import Job, Where, here
from m2mkd_ray.execution.leaving import LeavingNodes
from m2mkd_ray.execution.metrics import report_metrics
from m2mkd_ray.execution.reports import End, raised
from m2mkd_ray.execution.sharing import Hub, shared_stream
from m2mkd_ray.execution.stage import Resources
from m2mkd_ray.execution.store import Store
from m2mkd_ray.execution.worker import run_cohort

logger = logging.getLogger(__name__)


class Worker:
    """Takes a seat, runs it, rests, takes the next. Jobs come pickled: threads are set before they import anything."""

    def __init__(self, cpus: float, gpus: float) -> None:
        logging.basicConfig(level=logging.INFO)
        threads = str(max(1, math.ceil(cpus)))
        os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # since 2.5x Ray leaves all GPUs visible to who asked for none
        self._ends: Iterator[End] = iter(())

    def where(self) -> Where:
        """The place of this worker."""
        runtime = ray.get_runtime_context()
        labels = {name: str(value) for name, value in runtime.get_node_labels().items()}  # Ray's annotation says lists
        return {
            **here(),
            "node_id": runtime.get_node_id(),
            "actor_id": runtime.get_actor_id(),
            "node_group": node_group(labels),
            "spot": is_spot(labels),
        }

    def take(self, pickled_jobs: bytes, addresses: Sequence[str], store: Store, hub: Hub) -> None:
        """Take a seat; each call of `next` then runs it until another of its members has come to its end."""
        self._ends = self._run(pickled_jobs, addresses, store, OnNode(hub, self.where()["node_id"]))

    def next(self) -> End:
        """How the next member ended."""
        return next(self._ends)

    def rest(self, modules: Sequence[str]) -> None:
        """Give back what the last seat left in memory, and import what the next one is likely to need."""
        self._ends = iter(())
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        with _importing():
            for module in modules:
                try:
                    importlib.import_module(module)
                except Exception:
                    logger.warning("%s cannot be imported; whoever needs it will say so", module, exc_info=True)
        if not gc.get_freeze_count():
            gc.freeze()  # what is imported stays: looking through it takes 0.1 s after every seat

    def _run(self, pickled_jobs: bytes, addresses: Sequence[str], store: Store, around: "OnNode") -> Iterator[End]:
        try:
            with _importing():
                jobs: Sequence[Job] = ray.cloudpickle.loads(pickled_jobs)
        except (Exception, SystemExit) as error:
            yield from (raised(address, error) for address in addresses)
            return
        yield from run_cohort(jobs, store, self.where(), around)


@contextmanager
def _importing() -> Iterator[None]:
    """Without looking for garbage, which importing does not make: it takes a fifth of the import of torch and timm."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class OnNode:
    """What is around a worker of Ray's: the streams of its node, and those who watch it."""

    def __init__(self, hub: Hub, node_id: str) -> None:
        self._hub, self._node_id = hub, node_id
        self._leaving = LeavingNodes()

    def stream(self, key: str, maker: Maker, start: int, stop: int, consumer: str, workers: int) -> Iterator[Made]:
        """See `Around`."""
        return shared_stream(self._hub, self._node_id, key, maker, start, stop, consumer, workers)

    def has_notice(self) -> bool:
        """See `Around`."""
        return self._node_id in self._leaving.look()

    def report(self, job: Job, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """See `Around`."""
        report_metrics(job.name, job.of, job.address, step, total_steps, metrics)


@cache
def _actor_class() -> Any:
    """Made once: Ray looks through a class and exports it for every `ray.remote`, which takes 40 ms."""
    return ray.remote(Worker)


def ask_for_worker(resources: Resources, node: str | None) -> Any:
    """An actor with these resources, on a node if one is named; it comes up when there is room.

    A node that is named has been chosen by its group already, so that the group is asked for only where none is.
    Ray restarts it never (`max_restarts=0`): the executor does, which counts kinds of failure apart.
    """
    return (
        _actor_class()
        .options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            memory=int(resources.memory_gb * 1e9) if resources.memory_gb else None,
            max_restarts=0,
            max_task_retries=0,
            label_selector=label_selector(resources) if node is None else None,
            scheduling_strategy=None if node is None else NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(resources.cpus, resources.gpus)
    )
