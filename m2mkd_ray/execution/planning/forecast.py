"""What a placer would do: its decisions carried out in time that is only counted.

The same placer that a run asks is asked here, whenever a stage would end, so what is
shown beforehand is what will be done, if costs are as expected and nothing fails.
"""

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from m2mkd_ray.errors import PlanError
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.placement import Occupied, Placer, Seat, View
from m2mkd_ray.execution.planning.fleet import held_by, node_id
from m2mkd_ray.execution.stage import Stage, in_order

Duration = Callable[[Seat, Node], float]
"""Seconds that a seat takes on a node."""


@dataclass(frozen=True)
class Visit:
    """A seat's place and time."""

    seat: Seat
    node: Node
    start_s: float
    end_s: float
    devices: int = 1
    """Devices that it is spread over."""

    @property
    def gpus(self) -> float:
        """GPUs that it holds."""
        return sum(each.gpus for each in held_by(self.seat))

    @property
    def cpus(self) -> float:
        """CPU cores that it holds."""
        return sum(each.cpus for each in held_by(self.seat))


def forecast(
    stages: Sequence[Stage],
    placer: Placer,
    nodes: Sequence[Node],
    duration: Duration,
    seconds: Mapping[str, float] | None = None,
) -> list[Visit]:
    """Run stages in counted time.

    Args:
        stages: what is to run; of what they read, however far back, only stages among these are waited for.
        placer: decides; seats without a node go, in their order, to the first node with room, as Ray packs.
        nodes: where.
        duration: seconds of a seat on a node.
        seconds: handed to the placer, see `View`.

    Raises:
        PlanError: stages are left that the placer gives no seat, though nothing is at work any more.
    """
    return _Clock(stages, placer, nodes, duration, dict(seconds or {})).run()


def ancestors(stage: Stage, among: Collection[str]) -> list[str]:
    """Addresses of what a stage reads, and of what these read, as far as they are among those given."""
    return [read.address for read in in_order([stage])[:-1] if read.address in among]


class _Clock:
    """The state of the world at a counted time."""

    def __init__(
        self,
        stages: Sequence[Stage],
        placer: Placer,
        nodes: Sequence[Node],
        duration: Duration,
        seconds: dict[str, float],
    ) -> None:
        self._placer, self._duration, self._seconds = placer, duration, seconds
        self._nodes = {node_id(node): node for node in nodes}
        self._free = {node_id(node): dict(node.resources) for node in nodes}
        self._waiting = {stage.address: stage for stage in stages}
        self._reads = {stage.address: set(ancestors(stage, self._waiting)) for stage in stages}
        self._done: set[str] = set()
        self._at_work: list[tuple[float, int, Visit]] = []
        self._now = 0.0
        self._visits: list[Visit] = []

    def run(self) -> list[Visit]:
        """Until nothing is left."""
        while self._waiting or self._at_work:
            self._start()
            if not self._at_work:
                names = ", ".join(sorted(stage.name for stage in self._waiting.values()))
                raise PlanError(f"No node can take {names}, though nothing else runs. Lower their resources.")
            self._end_next()
        return self._visits

    def _start(self) -> None:
        ready = [stage for stage in self._waiting.values() if self._is_ready(stage)]
        if not ready:
            return
        occupied = [Occupied(v.seat, node_id(v.node), self._now - v.start_s) for _, _, v in self._at_work]
        view = View(tuple(self._nodes.values()), tuple(occupied), self._seconds)
        for seat in self._placer.seats(ready, view):
            node = self._node_for(seat)
            if node is not None:
                self._begin(seat, node)

    def _is_ready(self, stage: Stage) -> bool:
        return self._reads[stage.address] <= self._done

    def _node_for(self, seat: Seat) -> Node | None:
        names = list(self._nodes) if seat.node is None else [seat.node]
        return next((self._nodes[name] for name in names if self._holds(name, seat)), None)

    def _holds(self, name: str, seat: Seat) -> bool:
        return all(self._free[name].get(key, 0.0) >= need - 1e-6 for key, need in _needs(seat).items() if need)

    def _begin(self, seat: Seat, node: Node) -> None:
        end = self._now + self._duration(seat, node)
        visit = Visit(seat, node, self._now, end, max(1, len(held_by(seat)) - 1))
        self._visits.append(visit)
        heapq.heappush(self._at_work, (end, len(self._visits), visit))
        for key, need in _needs(seat).items():
            self._free[node_id(node)][key] = self._free[node_id(node)].get(key, 0.0) - need
        for stage in seat.stages:
            del self._waiting[stage.address]

    def _end_next(self) -> None:
        """Let time pass until the next seats end, all that end at once."""
        self._now = self._at_work[0][0]
        while self._at_work and self._at_work[0][0] <= self._now + 1e-9:
            _, _, visit = heapq.heappop(self._at_work)
            for key, need in _needs(visit.seat).items():
                self._free[node_id(visit.node)][key] += need
            self._done |= {stage.address for stage in visit.seat.stages}


def _needs(seat: Seat) -> dict[str, float]:
    held = held_by(seat)
    return {
        "CPU": sum(each.cpus for each in held),
        "GPU": sum(each.gpus for each in held),
        "memory": sum((each.memory_gb or 0.0) * 1e9 for each in held),
    }
