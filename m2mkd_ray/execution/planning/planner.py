"""The planner: a placer that asks for a schedule of what is ready whenever something has changed.

It gives away only what should start now. Works that the schedule has wait, for a fast
device say, are left out and asked about again when a work has ended or a node has come
or gone, so nothing is bound to a place before its time. Where the cluster may grow,
what is over gets seats without a node: their demand is what an autoscaler sees.

A stage that asks for GPUs gets a whole one or what the schedule gives it; a share that
its resources say is for placers that plan nothing.

Several devices give the same training but for rounding and the draws of stochastic
depth, so only works on GPUs are spread without being told to, and only with the
policy `auto`; of others, and with other policies, it is a decision by hand.

What processes hold that a stage starts by itself, the ranks of a fine-tuning, is not
in the planner's books, but where its `Stage.spread` tells of them: they wait for Ray
to find them room, and hold what the planner may think free until a stage there ends.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from m2mkd_ray.execution.feasibility import Node, lack
from m2mkd_ray.execution.placement import Occupied, Seat, View
from m2mkd_ray.execution.planning.bounds import lacking
from m2mkd_ray.execution.planning.devices import device_type, known_type, speed_of
from m2mkd_ray.execution.planning.fleet import Taken, devices_for, fits, held_by, node_id, on_each
from m2mkd_ray.execution.planning.layout import Booking
from m2mkd_ray.execution.planning.schedule import BUDGET, Policy, schedule
from m2mkd_ray.execution.planning.works import ANY, Device, Work, together_s
from m2mkd_ray.execution.stage import Resources, Stage

MEMBERS = 8
"""Most members of a cohort that is planned; memory may allow fewer."""
UTILISATION = 0.4
"""Share of its peak that a device reaches where nothing was measured (40 to 60 % are usual for transformers:
PaLM, arXiv 2204.02311, table 3)."""
PER_DOUBLING = 0.95
"""Efficiency of data parallel training for each doubling of devices, where nothing was measured."""
START_S = 20.0
"""Assumed, not measured: what it takes until processes on several devices have found each other and loaded their
models, so that short works stay on one."""
_MANY = 100
"""Beyond so many works the longest first is good enough, and a run has many ends at which to ask again."""
_LEAST_LEFT = 0.02
"""Of a work that takes longer than expected, so much of its expected seconds is still to come."""


@dataclass(frozen=True)
class ByHand:
    """What somebody decided about a stage."""

    devices: int | None = None
    """Spread over so many."""
    cohort: str = ""
    """Runs together with those of its mates that have the same name here."""
    gpus: float | None = None
    """A share of a GPU."""
    node_type: str = ""
    """Only on devices of this type."""


class Planner:
    """Seats by schedule.

    Args:
        works: measured or expected costs of stages, by address or name; of others, what they took before counts
            (`View.seconds`), else their FLOPs, else as long as the others on average.
        policy: which forms are considered, see `schedule`.
        speeds: speed of types of device relative to the one on which `View.seconds` were taken; others are
            compared by their peaks (`devices.GPU_TYPES`) with the most common type.
        grows: whether an autoscaler may add nodes for seats without a node.
        by_hand: what is decided already, by stage name.
        members: most members of a cohort.
        left: what share of a stage is still to be done, by its address, 0 to 1. Asked when a stage is first placed,
            and again when it waits once more after it had a seat; None: all of every stage.
    """

    replans = True
    """Seats that have not begun may be taken back when nodes come or go, and asked for again."""

    def __init__(
        self,
        works: Mapping[str, Work] | None = None,
        *,
        policy: Policy = "auto",
        speeds: Mapping[str, float] | None = None,
        grows: bool = False,
        by_hand: Mapping[str, ByHand] | None = None,
        members: int = MEMBERS,
        left: Callable[[str], float] | None = None,
    ) -> None:
        self._known = dict(works or {})
        self._policy, self._speeds, self._grows = policy, speeds, grows
        self._by_hand = dict(by_hand or {})
        self._members = members
        self._ask_left, self._left = left, dict[str, float]()
        self._had_seats: set[str] = set()
        """Addresses of stages that were given a seat after they were asked about last."""
        self._lacks: dict[str, str] = {}
        self._nodes: list[Node] = []
        self._lacks_alone: dict[tuple[str, Resources], str | None] = {}
        """On these nodes; asked for again and again while many stages wait."""

    def seats(self, ready: Sequence[Stage], view: View) -> list[Seat]:
        """See `Placer`. Where no nodes are known, every stage gets a seat as it asks for it."""
        if not view.nodes:
            return [Seat((stage,), stage.resources) for stage in ready]
        self._lacks = {}
        for address in self._had_seats & {stage.address for stage in ready}:
            self._had_seats.remove(address)
            self._left.pop(address, None)  # it was at work perhaps, and a checkpoint holds more of it
        works = self.works(ready, view.nodes, view.seconds)
        taken = [each for occupied in view.occupied for each in self._taken(occupied, view)]
        seats = [Seat((stage,), stage.resources) for stage in ready if _holds_nothing(stage)]
        for request, stages in _by_request(ready).items():
            devices = devices_for(request, view.nodes, taken)
            of_group = {works[stage.address].name: stage for stage in stages}
            of_request = [works[stage.address] for stage in stages]
            for seat in self._seats_of(of_request, of_group, request, devices, view.nodes):
                fitting = seat if seat.node is None else _fitting(seat, of_group, request, view.nodes, taken)
                if fitting is not None:
                    seats.append(fitting)
                    taken += self._taken(Occupied(fitting, fitting.node, 0.0), view)
        self._had_seats |= {stage.address for seat in seats for stage in seat.stages}
        return seats

    def lacks(self, stage: Stage, view: View) -> str | None:
        """See `Placer`; of a cohort by hand, which has to fit together, as it was when seats were asked for."""
        if self._nodes != list(view.nodes):
            self._nodes, self._lacks_alone = list(view.nodes), {}
        name = stage.address, stage.resources
        if name not in self._lacks_alone:
            self._lacks_alone[name] = self._lack_of(stage, view)
        return self._lacks_alone[name] or self._lacks.get(stage.address)

    def _lack_of(self, stage: Stage, view: View) -> str | None:
        if (text := lack(stage.resources, view.nodes)) is not None or _holds_nothing(stage):
            return text
        work = self.works([stage], view.nodes, view.seconds)[stage.address]
        devices = devices_for(_alone(stage.resources), view.nodes, ())
        return lacking([work], devices).get(work.name)

    def works(self, stages: Sequence[Stage], nodes: Sequence[Node], seconds: Mapping[str, float]) -> dict[str, Work]:
        """Costs of what is left of stages and how they may run, by address; the works' names are addresses too."""
        types = {has_gpus: _types(nodes, Resources(gpus=has_gpus)) for has_gpus in (0, 1)}
        costs = {stage.address: self._cost(stage, types[1 if on_each(stage).gpus else 0], seconds) for stage in stages}
        usual = _usual([cost for cost in costs.values() if cost is not None], {*types[0], *types[1]})
        return {
            stage.address: self._allowed(stage, self._rest(stage, costs[stage.address] or Work(stage.name, usual)))
            for stage in stages
        }

    def _rest(self, stage: Stage, cost: Work) -> Work:
        """What is left of a stage; of one at work, what was left when it got its seat."""
        if self._ask_left is None:
            return cost
        if stage.address not in self._left:
            self._left[stage.address] = self._ask_left(stage.address)
        left = self._left[stage.address]
        return replace(cost, seconds={name: seconds * left for name, seconds in cost.seconds.items()})

    def _cost(self, stage: Stage, types: Counter[str], seconds: Mapping[str, float]) -> Work | None:
        """What is known of a stage's cost; None if nothing is."""
        if (known := self._known.get(stage.address, self._known.get(stage.name))) is not None:
            return _on_more_types(known, types, stage.flops)
        if stage.name in seconds:
            before = seconds[stage.name]
            return Work(stage.name, {name: before / self._relative(name, types) for name in types} | {ANY: before})
        if stage.flops:
            return Work(stage.name, {name: expected_s(stage.flops, name) for name in types})
        return None

    def _relative(self, name: str, types: Counter[str]) -> float:
        if self._speeds is not None:
            return self._speeds.get(name, 1.0)
        usual = types.most_common(1)[0][0]
        return speed_of(name) / speed_of(usual) if known_type(name) and known_type(usual) else 1.0

    def _allowed(self, stage: Stage, cost: Work) -> Work:
        """The cost with the forms that the stage may take."""
        wide = {count: cost.widths.get(count, PER_DOUBLING ** math.log2(count)) for count in stage.spread}
        own = max(1, math.ceil(stage.resources.gpus))  # a stage that asks for two GPUs and knows no other way
        has_mates = stage.together is not None and own == 1
        work = replace(
            cost,
            name=stage.address,
            mates=_mates(stage) if has_mates else "",
            members=self._members if has_mates and stage.mates else 1,
            widths={own: 1.0} | (wide if self._policy == "auto" and stage.resources.gpus else {}),
            start_s=START_S,
        )
        hand = self._by_hand.get(stage.name)
        return work if hand is None else _as_by_hand(work, hand, wide)

    def _seats_of(
        self,
        works: Sequence[Work],
        stages: Mapping[str, Stage],
        request: Resources,
        devices: Sequence[Device],
        nodes: Sequence[Node],
    ) -> list[Seat]:
        refused = lacking(works, devices)
        self._lacks |= refused
        # Where a node could hold it, it would be put there, though its type or its GPUs' memory will not do.
        asks_for_more = self._grows and lack(request, nodes) is not None
        seats = [_elsewhere(stages[name], request) for name in stages if name in refused and asks_for_more]
        placed = [work for work in works if work.name not in refused]
        if not placed or not (self._grows or any(_has_room(device) for device in devices)):
            return seats
        budget = BUDGET if len(placed) <= _MANY else 0
        for booking in schedule(placed, devices, policy=self._policy, budget=budget).bookings:
            of_booking = [stages[work.name] for work in booking.works]
            if booking.start_s <= 0:
                seats.append(_seat(of_booking, booking, request, devices[booking.devices[0]].node))
            elif self._grows:
                seats.append(_seat(of_booking, booking, request, None))
        return seats

    def _taken(self, occupied: Occupied, view: View) -> list[Taken]:
        """What a seat at work holds, and until when it is expected to."""
        where = occupied.node or occupied.seat.node  # a seat that waits for its node's worker has the place already
        if where is None:
            return []
        request = held_by(occupied.seat)[-1]
        type_name = next((device_type(node, request) for node in view.nodes if node_id(node) == where), "")
        expected = self.expected_s(occupied.seat, type_name, view)
        until = max(expected - occupied.since_s, _LEAST_LEFT * expected, 1e-3)
        return [Taken(where, resources, until) for resources in held_by(occupied.seat)]

    def expected_s(self, seat: Seat, type_name: str, view: View) -> float:
        """How long a seat takes on devices of a type; a share below what a work keeps busy makes it slower."""
        works = self.works(seat.stages, view.nodes, view.seconds)
        of_seat = [works[stage.address] for stage in seat.stages]
        seconds = together_s(of_seat, type_name)
        if seconds == math.inf:
            return 1.0
        width, gpus = len(held_by(seat)) - 1, seat.resources.gpus
        if width > 1:
            return START_S + seconds / (width * of_seat[0].widths.get(width, PER_DOUBLING ** math.log2(width)))
        return seconds * max(1.0, of_seat[0].occupancy / gpus if 0 < gpus < 1 else 1.0)


def expected_s(flops: float, type_name: str) -> float:
    """Seconds that FLOPs take on a type of device of which nothing was measured."""
    return flops / (speed_of(type_name) * 1e12 * UTILISATION)


def _types(nodes: Sequence[Node], request: Resources) -> Counter[str]:
    """Types of device for a request, and how many nodes have each."""
    name = "GPU" if request.gpus else "CPU"
    found = Counter(device_type(node, request) for node in nodes if node.resources.get(name))
    return found or Counter({name.lower(): 1})


def _usual(known: Sequence[Work], types: Collection[str]) -> dict[str, float]:
    """Seconds of a work of which nothing is known: by type, the mean of the others that can run there."""
    finite = {name: [cost.seconds_on(name) for cost in known if cost.seconds_on(name) < math.inf] for name in types}
    return {name: sum(each) / len(each) for name, each in finite.items() if each} or {ANY: 1.0}


def _on_more_types(known: Work, types: Iterable[str], flops: float) -> Work:
    """A cost with the types that it does not tell of, those of nodes that came later say, by their peaks.

    Compared with the type that is most like what the table has; by the stage's FLOPs where it could run on none so
    far. Infinite seconds tell that a type cannot run it.
    """
    new = [name for name in types if not known.tells_of(name)]
    told = [name for name, seconds in known.seconds.items() if seconds < math.inf and name != ANY]
    if not new or not (told or flops):
        return known
    if not told:
        return replace(known, seconds={**known.seconds, **{name: expected_s(flops, name) for name in new}})
    like = max(told, key=lambda name: (known_type(name) is not None, speed_of(name)))
    seconds = {name: known.seconds_on(like) * speed_of(like) / speed_of(name) for name in new}
    memory = dict.fromkeys(new, max(known.memory_gb.values())) if known.memory_gb else {}
    return replace(known, seconds={**known.seconds, **seconds}, memory_gb={**memory, **known.memory_gb})


def _alone(resources: Resources) -> Resources:
    """What stages that are planned together ask for: a whole GPU each, where they want any."""
    return resources.model_copy(update={"gpus": 1.0 if resources.gpus else 0.0})


def _holds_nothing(stage: Stage) -> bool:
    return not (stage.resources.cpus or stage.resources.gpus or stage.resources.memory_gb)


def _mates(stage: Stage) -> str:
    """Equal for stages that one function may run together; empty: it has no mates.

    What writes logits reads the same batches and models as the pairs do, and has the same mates, but is no pair.
    """
    how = stage.together
    return f"{stage.mates} {getattr(how, '__module__', '')}.{getattr(how, '__qualname__', how)}" if stage.mates else ""


def _by_request(ready: Sequence[Stage]) -> dict[Resources, list[Stage]]:
    """Stages that see the same devices: those that want GPUs first, as other stages can be elsewhere."""
    groups: dict[Resources, list[Stage]] = {}
    for stage in ready:
        if not _holds_nothing(stage):
            groups.setdefault(_alone(stage.resources), []).append(stage)
    return dict(sorted(groups.items(), key=lambda group: (-group[0].gpus, -group[0].cpus)))


def _as_by_hand(work: Work, hand: ByHand, wide: Mapping[int, float]) -> Work:
    if hand.devices is not None:
        work = replace(work, widths={hand.devices: {1: 1.0, **wide}[hand.devices]}, mates="", members=1)
    if hand.cohort and work.mates:  # a stage that a cohort was too much for has none, and runs alone
        work = replace(work, cohort=f"{hand.cohort} of {work.mates}", widths={1: 1.0})
    if hand.gpus is not None:
        work = replace(work, share=hand.gpus, widths={1: 1.0}, mates="", members=1)
    if hand.node_type:
        work = replace(work, seconds={hand.node_type: work.seconds_on(hand.node_type)})
    return work


def _fitting(
    seat: Seat, stages: Mapping[str, Stage], request: Resources, nodes: Sequence[Node], taken: Sequence[Taken]
) -> Seat | None:
    """The seat, if its node has all that it holds; else its one stage on one device; None if that has no room either.

    A schedule counts devices. What it does not count are the cores of a worker that only drives, and those that
    stages of other requests hold.
    """
    options = [seat]
    if len(held_by(seat)) > 1:
        alone = replace(stages[seat.stages[0].address], resources=request)
        options.append(Seat((alone,), request, seat.node))
    node = next(node for node in nodes if node_id(node) == seat.node)
    held = [each.resources for each in taken if each.node == seat.node]
    return next((option for option in options if fits(node, [*held, *held_by(option)])), None)


def _has_room(device: Device) -> bool:
    return sum(share for share, _ in device.busy) < 1 - 1e-6


def _seat(stages: Sequence[Stage], booking: Booking, request: Resources, node: str | None) -> Seat:
    """A booking as the executor understands it; the members get the resources and placement that they run with."""
    width = len(booking.devices)
    if width > 1 and width in stages[0].spread:
        spread = stages[0].spread[width]
        stage = replace(stages[0], resources=spread.resources, placement=spread.placement)
        return Seat((stage,), spread.resources, node)
    resources = request
    if request.gpus:
        # Ray counts GPUs in ten-thousandths, and a third rounded up would not fit three times.
        share = width if booking.share > 1 - 1e-9 else math.floor(booking.share * 1e4) / 1e4
        resources = request.model_copy(update={"gpus": float(share)})
    return Seat(tuple(replace(stage, resources=resources) for stage in stages), resources, node)


def _elsewhere(stage: Stage, request: Resources) -> Seat:
    """A seat on a node that is still to come."""
    resources = request if not stage.resources.gpus else stage.resources
    return Seat((replace(stage, resources=resources),), resources)


__all__ = ["MEMBERS", "ByHand", "Planner", "expected_s"]
