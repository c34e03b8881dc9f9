"""Seats as the plan gives them: with the resources that each stage asks for, on any node, longest first."""

from collections.abc import Callable, Mapping, Sequence

from m2mkd_ray.execution.feasibility import Node, in_ray, is_in_group, lack
from m2mkd_ray.execution.placement import GATHER_S, Seat, View
from m2mkd_ray.execution.stage import Resources, Stage


class AsGiven:
    """A seat for every stage, or for up to `Stage.cohort` stages that may run together."""

    replans = False

    def seats(self, ready: Sequence[Stage], view: View) -> list[Seat]:
        """See `Placer`. What takes longest comes first, as it took before, or else by its operations.

        A cohort that has room waits a while for mates that are coming: their needs may end about when its own did.
        """
        seconds = expected_seconds(ready, view.seconds)
        # A sort is stable: of what is not known, the order of the plan stays.
        longest_first = sorted(ready, key=lambda stage: -seconds.get(stage.address, 0.0))
        cohorts: list[list[Stage]] = []
        with_room: dict[object, list[Stage]] = {}
        for stage in longest_first:
            alike = _alike(stage)
            cohort = with_room.get(alike, [])
            if not cohort:
                cohorts.append(cohort)
            cohort.append(stage)
            with_room[alike] = cohort if len(cohort) < stage.cohort else []
        coming = {_alike(stage) for stage in view.coming}
        waits = [
            len(cohort) < cohort[0].cohort
            and _alike(cohort[0]) in coming
            and max(view.ready_s.get(stage.address, 0.0) for stage in cohort) < GATHER_S
            for cohort in cohorts
        ]
        return [Seat(tuple(cohort), cohort[0].resources) for cohort, is_early in zip(cohorts, waits) if not is_early]

    def lacks(self, stage: Stage, view: View) -> str | None:
        """See `Placer`."""
        return lack(stage.resources, view.nodes)


def _alike(stage: Stage) -> object:
    """Equal for stages that may be in one cohort."""
    has_mates = stage.together is not None and stage.mates
    return (stage.mates, stage.together, stage.resources, stage.cohort) if has_mates else stage.address


def expected_seconds(stages: Sequence[Stage], measured: Mapping[str, float]) -> dict[str, float]:
    """How long stages may take, by address; those of which nothing is known are left out.

    What was never measured is judged by its operations, at the speed of stages of which both are known. Where
    there are none of these, any speed gives the right order among what was not measured, and so fast a one is taken
    that it comes after what was.
    """
    speeds = sorted(stage.flops / measured[stage.name] for stage in stages if stage.flops and measured.get(stage.name))
    speed = speeds[len(speeds) // 2] if speeds else 1e30
    by_flops = {stage.address: stage.flops / speed for stage in stages if stage.flops}
    return by_flops | {stage.address: measured[stage.name] for stage in stages if stage.name in measured}


class Gathering:
    """Seats as the plan gives them, for a run to which stages are added: a cohort that has room is handed out only
    when a node has room for its worker, so that mates which come later join it while it could only have waited.

    Args:
        ranks: what the processes hold that a stage starts itself. Where others have started theirs, it gets a seat
            only when nodes have room for its own, and does not sit in a worker that waits for them.
        asks: whether nodes may come. Then a cohort of whose kind no worker is there or asked for is handed out
            without room, since its demand is what brings a node.
    """

    replans = False

    def __init__(
        self, ranks: Callable[[Stage], Sequence[Resources]] = lambda stage: (), *, asks: bool = False
    ) -> None:
        self._given = AsGiven()
        self._ranks, self._asks = ranks, asks

    def seats(self, ready: Sequence[Stage], view: View) -> list[Seat]:
        """See `Placer`."""
        free = [(node, dict(node.resources)) for node in view.nodes]
        have_ranks = False
        for occupied in view.occupied:
            where = [each for each in free if occupied.node in (None, each[0].id)]
            _take(occupied.seat.resources, where)
            ranks = [each for stage in occupied.seat.stages for each in self._ranks(stage)]
            _take_all(ranks, free)
            have_ranks = have_ranks or bool(ranks)
        held = {occupied.seat.resources for occupied in view.occupied}
        seats = []
        for seat in self._given.seats(ready, view):
            ranks = [each for stage in seat.stages for each in self._ranks(stage)]
            if ranks and not _take_all(ranks, free) and have_ranks:
                continue
            have_ranks = have_ranks or bool(ranks)
            if _take(seat.resources, free) or _is_full(seat) or (self._asks and seat.resources not in held):
                seats.append(seat)
                held.add(seat.resources)
        return seats

    def lacks(self, stage: Stage, view: View) -> str | None:
        """See `Placer`."""
        return self._given.lacks(stage, view)


def _is_full(seat: Seat) -> bool:
    first = seat.stages[0]
    return len(seat.stages) >= first.cohort or first.together is None or not first.mates


def _take(resources: Resources, nodes: Sequence[tuple[Node, dict[str, float]]]) -> bool:
    """Take resources from the first node of their group that has them free; whether one had."""
    wanted = in_ray(resources)
    for node, free in nodes:
        if is_in_group(node, resources) and all(free.get(name, 0.0) + 1e-6 >= held for name, held in wanted.items()):
            free.update({name: free.get(name, 0.0) - held for name, held in wanted.items()})
            return True
    return False


def _take_all(wanted: Sequence[Resources], nodes: Sequence[tuple[Node, dict[str, float]]]) -> bool:
    """Take several, or none if there is not room for all; whether there was."""
    left = [(node, dict(free)) for node, free in nodes]
    if not all(_take(resources, left) for resources in wanted):
        return False
    for (_, free), (_, rest) in zip(nodes, left, strict=True):
        free.update(rest)
    return True
