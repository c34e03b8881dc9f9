"""What workers hold of a cluster while stages run, added up as it goes: hours of nodes, GPUs and cores, by node group.

The report has the same from the histories (`reporting/costs.py`): a worker counts once,
however many stages it runs; a node counts while a stage is at work there. Ranks are what a
stage holds beside its worker. They count from the stage's first report, since they may wait
long for their machines; their nodes are not known, only the group that they asked for.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from m2mkd_ray.execution.events import Event, StageProgress, StageStarted, StageWaits
from m2mkd_ray.execution.job import Where
from m2mkd_ray.execution.stage import Resources, Stage

UNNAMED = "no group"
"""Of nodes that have no label."""

Tags = tuple[str, str]
"""Node group, and whether it may be taken away (`true`, `false`)."""
Hours = tuple[str, Tags, float]
"""What was held (node_hours, gpu_hours, cpu_hours), where, and for how long."""


@dataclass
class _Worker:
    where: Where
    holds: Sequence[Resources]
    """Its own share first, then one of each rank."""
    inside: set[str] = field(default_factory=set)
    """Addresses of the stages that it runs."""
    has_ranks: bool = False
    """Whether its ranks are known to be at work."""


class Held:
    """Workers at work, and what they have held since the last look.

    Args:
        clock: seconds, of any origin.
        holds: all that a stage holds while it runs, its worker's share first.
    """

    def __init__(self, clock: Callable[[], float], holds: Callable[[Stage], Sequence[Resources]]) -> None:
        self._clock, self._holds = clock, holds
        self._workers: dict[object, _Worker] = {}
        self._last = clock()

    def start(self, stage: Stage, where: Where) -> None:
        """A worker took a stage up; look before."""
        key = (where.get("host"), where.get("pid"), where.get("actor_id"))
        self._workers.setdefault(key, _Worker(where, self._holds(stage))).inside.add(stage.address)

    def report(self, stage: Stage) -> None:
        """A stage has said how far it is, so that its ranks are at work; look before."""
        for worker in self._workers.values():
            worker.has_ranks |= stage.address in worker.inside

    def leave(self, stage: Stage) -> Tags | None:
        """A stage is not at work any more; where it was, None if it was nowhere. Look before."""
        for key, worker in list(self._workers.items()):
            if stage.address in worker.inside:
                worker.inside.discard(stage.address)
                if not worker.inside:
                    del self._workers[key]
                return _tags(worker.where)
        return None

    def hear(self, event: Event) -> Tags | None:
        """Take an event in; where its stage was at work until now, None if it was nowhere. Look before."""
        if isinstance(event, StageProgress):
            self.report(event.stage)
        if isinstance(event, StageProgress | StageWaits):
            return None  # neither changes who is at work
        left = self.leave(event.stage)
        if isinstance(event, StageStarted):
            self.start(event.stage, event.where)
        return left

    def sizes(self) -> Mapping[int, int]:
        """How many workers are at work, by the number of stages that each runs."""
        return Counter(len(worker.inside) for worker in self._workers.values())

    def look(self) -> Iterator[Hours]:
        """What was held since the last look."""
        now = self._clock()
        hours, self._last = (now - self._last) / 3600, now
        nodes: Mapping[object, Where] = {
            worker.where.get("node_id") or worker.where.get("host"): worker.where for worker in self._workers.values()
        }
        for where in nodes.values():
            yield "node_hours", _tags(where), hours
        for worker in self._workers.values():
            for place, each in enumerate(worker.holds if worker.has_ranks else worker.holds[:1]):
                tags = (each.group, "false") if place and each.group else _tags(worker.where)
                yield "gpu_hours", tags, each.gpus * hours
                yield "cpu_hours", tags, each.cpus * hours


def _tags(where: Where) -> Tags:
    return str(where.get("node_group") or UNNAMED), "true" if where.get("spot") else "false"
