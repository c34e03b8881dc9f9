"""From nodes to devices: what a node's GPUs and CPU cores are to stages of one request, and when each is free."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from m2mkd_ray.errors import PlanError
from m2mkd_ray.execution.feasibility import Node, is_in_group
from m2mkd_ray.execution.placement import Seat
from m2mkd_ray.execution.planning.devices import device_type, gpu_memory_gb, is_spot
from m2mkd_ray.execution.planning.works import Device
from m2mkd_ray.execution.stage import Resources, Stage

_MOST_SLOTS = 16
"""Of a GPU whose works need no CPU core."""


@dataclass(frozen=True)
class Taken:
    """Resources of a node that somebody holds."""

    node: str
    resources: Resources
    until_s: float
    """Seconds from now."""


def node_id(node: Node) -> str:
    """What seats call a node."""
    return node.id or node.name


def held_by(seat: Seat) -> list[Resources]:
    """All that a seat holds: its worker, and every device that its stage is spread over."""
    width = width_of(seat.stages[0]) if len(seat.stages) == 1 else 1
    if width > 1:
        return [seat.resources, *[seat.stages[0].spread[width].device] * width]
    return [seat.resources]


def width_of(stage: Stage) -> int:
    """Devices that a stage is spread over as its placement says it now; 1: its worker's own."""
    as_now = (stage.placement, stage.resources)
    return next((n for n, spread in stage.spread.items() if (spread.placement, spread.resources) == as_now), 1)


def on_each(stage: Stage) -> Resources:
    """What a stage asks of each device that it runs on."""
    width = width_of(stage)
    return stage.spread[width].device if width > 1 else stage.resources


def fits(node: Node, held: Sequence[Resources]) -> bool:
    """Whether a node has as much as all of these hold together."""
    has = node.resources
    return (
        sum(each.cpus for each in held) <= has.get("CPU", 0.0) + 1e-6
        and sum(each.gpus for each in held) <= has.get("GPU", 0.0) + 1e-6
        and sum(each.memory_gb or 0.0 for each in held) * 1e9 <= has.get("memory", 0.0) + 1
    )


def devices_for(request: Resources, nodes: Sequence[Node], taken: Sequence[Taken]) -> list[Device]:
    """The devices that stages of a request see: GPUs if they ask for some, else portions of CPU cores.

    Args:
        request: of a stage alone on one device; with GPUs, `cpus` is what each needs beside it.
        nodes: all nodes.
        taken: what is held on them.

    Raises:
        PlanError: the request is for nothing, so a node would be any number of devices.
    """
    if not (request.cpus or request.gpus or request.memory_gb):
        raise PlanError(
            "Stages that ask for no CPU cores, GPUs or memory cannot be planned: a node would hold any number of "
            "them. Give them cpus, or let them run where Ray puts them (--placement given)."
        )
    found = []
    for node in nodes:
        if not is_in_group(node, request):
            continue
        held = [each for each in taken if each.node == node_id(node)]
        found += _gpus(request, node, held) if request.gpus else _portions(request, node, held)
    return found


def _portions(request: Resources, node: Node, taken: Sequence[Taken]) -> list[Device]:
    """As many devices as the node can hold such stages at once."""
    room = _room(request, node)
    free = _free_times(request, node, taken, room)
    return [_device(node, request, math.inf, 1, ((1.0, until),) if until > 0 else ()) for until in free]


def _gpus(request: Resources, node: Node, taken: Sequence[Taken]) -> list[Device]:
    """The GPUs that the node's other resources can feed, with what is at work on each."""
    one = request.model_copy(update={"gpus": 1.0})
    usable = min(_room(one, node), int(node.resources.get("GPU", 0.0)))
    if usable < 1:
        return []
    busy = _packed([each for each in taken if each.resources.gpus], usable)
    # Works without GPUs hold CPU cores too: GPUs that cannot be fed now wait for them.
    beside = [each for each in taken if not each.resources.gpus]
    waits = sorted(_free_times(one, node, beside, usable))
    idle = [place for place in range(usable) if not busy[place]]
    for place, until in zip(reversed(idle), reversed(waits)):
        if until > 0:
            busy[place].append((1.0, until))
    cpus = node.resources.get("CPU", 0.0) / int(node.resources["GPU"])
    slots = int(cpus / request.cpus + 1e-9) if request.cpus else _MOST_SLOTS
    memory = gpu_memory_gb(node)
    return [_device(node, request, memory, max(1, min(slots, _MOST_SLOTS)), tuple(each)) for each in busy]


def _device(
    node: Node, request: Resources, memory_gb: float, slots: int, busy: tuple[tuple[float, float], ...]
) -> Device:
    return Device(node_id(node), device_type(node, request), memory_gb, is_spot(node), slots, busy)


def _packed(taken: Sequence[Taken], num_gpus: int) -> list[list[tuple[float, float]]]:
    """What is on each GPU: whole ones first, then fractions, each on the fullest GPU that has room, as Ray packs."""
    busy: list[list[tuple[float, float]]] = [[] for _ in range(num_gpus)]
    for each in sorted(taken, key=lambda each: -each.resources.gpus):
        whole, share = divmod(each.resources.gpus, 1.0)
        for part in [1.0] * int(whole) + ([share] if share > 1e-9 else []):
            used = [sum(held for held, _ in of) for of in busy]
            fits = [place for place in range(num_gpus) if used[place] + part <= 1 + 1e-6]
            if fits:
                busy[max(fits, key=lambda place: used[place])].append((part, each.until_s))
    return busy


def _room(request: Resources, node: Node) -> int:
    """Such stages that an empty node holds at once."""
    return _most(request, _has(node))


def _free_times(request: Resources, node: Node, taken: Sequence[Taken], room: int) -> list[float]:
    """For each of `room` such stages when the node can hold it, as what is held is given back."""
    free = _has(node)
    for each in taken:
        free = _add(free, each.resources, -1)
    times = [0.0] * min(room, _most(request, free))
    for each in sorted(taken, key=lambda each: each.until_s):
        free = _add(free, each.resources, 1)
        times += [each.until_s] * (min(room, _most(request, free)) - len(times))
    return times + [max((each.until_s for each in taken), default=0.0)] * (room - len(times))


def _has(node: Node) -> tuple[float, float]:
    return node.resources.get("CPU", 0.0), node.resources.get("memory", 0.0) / 1e9


def _add(free: tuple[float, float], resources: Resources, sign: int) -> tuple[float, float]:
    return free[0] + sign * resources.cpus, free[1] + sign * (resources.memory_gb or 0.0)


def _most(request: Resources, free: tuple[float, float]) -> int:
    """Such stages that cores and memory are enough for; GPUs are counted elsewhere."""
    rooms = [free[0] / request.cpus] if request.cpus else []
    rooms += [free[1] / request.memory_gb] if request.memory_gb else []
    return max(0, int(min(rooms) + 1e-9)) if rooms else 1 << 20  # of GPUs that need neither, all can be fed
