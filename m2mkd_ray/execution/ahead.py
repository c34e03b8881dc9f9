"""Has an autoscaler bring nodes before stages ask for them, and let go of those that only the past needed.

What is ready is asked for by the pool, as actors that wait: an autoscaler sees that by
itself. But a node takes minutes to come, so what will be ready soon is requested ahead
(`ray.autoscaler.sdk.request_resources`). Such a request says what the cluster has to be
able to hold, whatever runs on it, and it stays until another one takes its place: so it
names what will be running then, and is empty as soon as nothing is about to become
ready, and at the end of a run, however that ends. Nodes that nobody asks for go after the
cluster's own time-out.

Of a driver that is killed outright an actor on the head withdraws the last request
(`withdrawal.py`). Ray keeps one request a cluster: of several drivers the last one counts.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from m2mkd_ray.execution.runs import Run, State
from m2mkd_ray.execution.stage import Resources, Stage

_LOOK_EVERY_S = 5.0

Request = Callable[[Sequence[Resources]], None]
"""Asks for nodes that can hold all of these at once; empty: for none."""


def of_worker(stage: Stage) -> Sequence[Resources]:
    """What a stage holds that starts no ranks."""
    return (stage.resources,)


class Ahead:
    """Requests what stages need that become ready within a while.

    Args:
        request: see `Request`.
        lead_s: how long before a stage is expected to become ready its nodes are asked for.
        needs: all that a stage holds while it runs, a bundle a process.
    """

    def __init__(
        self, request: Request, lead_s: float, needs: Callable[[Stage], Sequence[Resources]] = of_worker
    ) -> None:
        self._request, self._lead_s, self._needs = request, lead_s, needs
        self._said: tuple[Resources, ...] | None = None
        self._first: dict[str, tuple[float, int]] = {}
        """Of each attempt that reports: when it was first heard (monotonic) and its step then, by address."""
        self._next_look = 0.0

    def look(self, runs: Mapping[str, Run], seconds: Mapping[str, float]) -> None:
        """Request anew where that has changed; `seconds` are what stages took before, by name. In order: a stage
        comes after what it reads. Looks every few seconds."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_EVERY_S
        self._say(tuple(wanted_ahead(runs, self._ends(runs, seconds), self._lead_s, self._needs)))

    def end(self) -> None:
        """Request nothing more."""
        self._say(())

    def _say(self, wanted: tuple[Resources, ...]) -> None:
        if wanted != self._said:
            self._request(wanted)
            self._said = wanted

    def _ends(self, runs: Mapping[str, Run], seconds: Mapping[str, float]) -> dict[str, float]:
        """In how many seconds each stage may end, by address; infinite where nothing is known."""
        ends: dict[str, float] = {}
        for address, run in runs.items():
            if run.state is State.RUNNING and run.started is not None:
                ends[address] = self._remaining(run, seconds.get(run.stage.name))
            elif run.state in (State.RUNNING, State.WAITING):
                ends[address] = begins_in(run, ends) + _whole(run.stage, seconds)
            else:
                ends[address] = 0.0 if run.state is State.COMPLETE else float("inf")
        return ends

    def _remaining(self, run: Run, took: float | None) -> float:
        """By its own speed, or else by what it took before."""
        assert run.started is not None
        progress, address = run.progress, run.stage.address
        if progress is None or run.changed is None:
            self._first.pop(address, None)
            return float("inf") if took is None else max(0.0, took - (time.monotonic() - run.started))
        since, step = self._first.setdefault(address, (run.changed, progress.step))
        if progress.step <= step:
            return float("inf") if progress.step < progress.total_steps else 0.0
        pace = (run.changed - since) / (progress.step - step)
        return max(0.0, pace * (progress.total_steps - progress.step) - (time.monotonic() - run.changed))


def begins_in(run: Run, ends: Mapping[str, float]) -> float:
    """In how many seconds all that a stage reads is complete."""
    return max((ends[read.address] for read in run.stage.reads.values()), default=0.0)


def wanted_ahead(
    runs: Mapping[str, Run], ends: Mapping[str, float], lead_s: float, needs: Callable[[Stage], Sequence[Resources]]
) -> list[Resources]:
    """What will be held at once when the stages that come within `lead_s` run; empty where none comes.

    That is what they hold themselves, and what those hold that run then too: not those that end before.
    """
    coming = [
        run
        for run in runs.values()
        if run.state is State.WAITING and begins_in(run, ends) <= lead_s and not _is_ready(run, runs)
    ]
    if not coming:
        return []
    last = max(begins_in(run, ends) for run in coming)
    stay = [run for run in runs.values() if run.state is State.RUNNING and ends[run.stage.address] > last]
    ready = [run for run in runs.values() if run.state is State.WAITING and _is_ready(run, runs)]
    return sorted(
        (bundle for run in (*stay, *ready, *coming) for bundle in needs(run.stage)),
        key=lambda bundle: (bundle.gpus, bundle.cpus, bundle.memory_gb or 0.0, bundle.group),
    )


def _is_ready(run: Run, runs: Mapping[str, Run]) -> bool:
    return all(runs[read.address].state is State.COMPLETE for read in run.stage.reads.values())


def _whole(stage: Stage, seconds: Mapping[str, float]) -> float:
    """How long a stage may take; one that computes next to nothing (splits, assembles) is taken to be short."""
    if (took := seconds.get(stage.name)) is not None:
        return took
    return float("inf") if stage.flops else 0.0
