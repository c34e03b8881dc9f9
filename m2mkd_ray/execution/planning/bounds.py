"""What no schedule can beat, and works that no device can take.

The lower bound is the larger of two. *Capacity*: give every class of device c a price
p_c per second, such that all devices together cost 1 a second. A schedule that ends at
T pays at most T. Whatever it does, it pays for every work at least its cheapest form on
its cheapest class, so T is at least the sum of these (weak duality; the best prices would
give the bound of the linear program of Lawler and Labetoulle 1978). The cheapest form of
a work alone is its share of a device (`occupancy`) for its seconds. Of mates, what each
does for itself is always paid, and what a cohort shares once a cohort: with the shared
costs in falling order and at most m members, cohorts pay at least for the 1st, the
(m+1)th, the (2m+1)th, and so on. Several devices never cost less than one (efficiency is
at most 1). Prices in proportion to speed are tried, equal prices, and a price on one
class alone where some works can run nowhere else. *Longest*: the longest work in its fastest form,
on as many devices as it may have.

Neither counts what devices are busy with, preemptions, starts, or works that wait for
others, so the bound holds with them too.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from m2mkd_ray.execution.planning.works import Device, Work


def lower_bound(works: Sequence[Work], devices: Sequence[Device]) -> float:
    """Seconds that no schedule of the works on the devices can beat; see the file's docstring for the proof.

    Each work can run on some device (`refusals`).
    """
    if not works:
        return 0.0
    counts = _counts(devices)
    capacity = max(_paid(works, prices) for prices in _prices(works, counts))
    return max(capacity, max(fastest_s(work, counts) for work in works))


def fastest_s(work: Work, types: Iterable[str]) -> float:
    """Seconds of a work in its fastest form: on the type that suits it best, on as many devices as it may have."""
    width = 1.0 if work.cohort or work.share else max(width * each for width, each in work.widths.items())
    return min(work.seconds_on(name) for name in types) / width


def refusals(works: Sequence[Work], devices: Sequence[Device]) -> dict[str, str]:
    """For each work that no device can take, by name, a sentence that says what is missing; empty if all can run."""
    return {name: f"{name} asks for {text}" for name, text in lacking(works, devices).items()}


def lacking(works: Sequence[Work], devices: Sequence[Device]) -> dict[str, str]:
    """For each work that no device can take, by name, what it asks for and what there is.

    Works that are to be a cohort by hand have to fit one device together.
    """
    kinds = _kinds(devices)
    found = {work.name: text for work in works if (text := _lack(work, kinds))}
    cohorts: dict[str, list[Work]] = {}
    for work in works:
        if work.cohort and work.name not in found:
            cohorts.setdefault(work.cohort, []).append(work)
    for members in cohorts.values():
        if (text := _lack_together(members, kinds)) is not None:
            found |= {work.name: text for work in members}
    return found


@dataclass(frozen=True)
class _Kind:
    """Devices of one type and memory."""

    type: str
    memory_gb: float
    count: int
    widest: int
    """On the node that has the most of them, bought alike."""


def _kinds(devices: Sequence[Device]) -> list[_Kind]:
    count = Counter((device.type, device.memory_gb) for device in devices)
    on_node = Counter((device.type, device.memory_gb, device.node, device.spot, device.slots) for device in devices)
    widest: dict[tuple[str, float], int] = {}
    for (type_name, memory, *_), number in on_node.items():
        widest[type_name, memory] = max(number, widest.get((type_name, memory), 0))
    return [_Kind(*each, count=number, widest=widest[each]) for each, number in count.items()]


def _lack_together(members: Sequence[Work], kinds: Sequence[_Kind]) -> str | None:
    """Of a cohort by hand whose members can run alone. Memory is counted as a schedule does: all of each member's."""
    typed = [kind for kind in kinds if all(work.seconds_on(kind.type) < math.inf for work in members)]
    who = f"a place in a cohort of {len(members)} by hand"
    if not typed:
        return f"{who}, but its members may not be on one type of device. Give them the same node_type."
    needs = {kind: sum(work.memory_on(kind.type) for work in members) for kind in typed}
    if any(needs[kind] <= kind.memory_gb * (1 + 1e-9) for kind in typed):
        return None
    return (
        f"{who}, which needs {min(needs.values()):.3g} GB of GPU memory, but no GPU has so much for it: the most on "
        f"one of {sum(kind.count for kind in typed)} is {max(kind.memory_gb for kind in typed):.3g} GB. Make the "
        f"cohort smaller, or add a node with larger GPUs."
    )


def _lack(work: Work, kinds: Sequence[_Kind]) -> str | None:
    if not kinds:
        return "a device, but the nodes have none that it could use. Add a node."
    typed = [kind for kind in kinds if work.seconds_on(kind.type) < math.inf]
    if not typed:
        has: Counter[str] = Counter()
        for kind in kinds:
            has[kind.type] += kind.count
        nodes_have = f"the nodes have {', '.join(f'{name} ({number})' for name, number in has.items())}"
        if not (types := _types_of(work)):
            return (
                f"more memory than the devices had on which it was tried, and {nodes_have}. Lower the stage's "
                f"micro_batch, or add a node with larger devices."
            )
        return f"a device of type {' or '.join(types)}, but {nodes_have}. Choose one of these, or add such a node."
    share = work.share or 1.0
    roomy = [kind for kind in typed if work.memory_on(kind.type) <= kind.memory_gb * share * (1 + 1e-9)]
    if not roomy:
        needs, most = min(work.memory_on(kind.type) for kind in typed), max(kind.memory_gb for kind in typed) * share
        return (
            f"{needs:.3g} GB of GPU memory, but no GPU has so much for it: the most on one of "
            f"{sum(kind.count for kind in typed)} is {most:.3g} GB. Lower the stage's micro_batch, or add a node with "
            f"larger GPUs."
        )
    if min(work.widths) > (widest := max(kind.widest for kind in roomy)):
        return (
            f"{min(work.widths)} devices of one node, but no node has so many: the most is "
            f"{widest}. Give it fewer, or add a larger node."
        )
    return None


def _types_of(work: Work) -> list[str]:
    return sorted(name for name, seconds in work.seconds.items() if seconds < math.inf)


def _counts(devices: Sequence[Device]) -> dict[str, int]:
    return dict(Counter(device.type for device in devices))


def _prices(works: Sequence[Work], counts: dict[str, int]) -> Iterator[dict[str, float]]:
    """Prices a second of each type, so that all devices together cost 1."""
    speeds = {name: _speed(works, name) for name in counts}
    total = sum(speeds[name] * count for name, count in counts.items())
    if total > 0:
        yield {name: speed / total for name, speed in speeds.items()}
    yield dict.fromkeys(counts, 1 / sum(counts.values()))
    for name, count in counts.items():
        if any(all(work.seconds_on(other) == math.inf for other in counts if other != name) for work in works):
            yield dict.fromkeys(counts, 0.0) | {name: 1 / count}


def _speed(works: Sequence[Work], name: str) -> float:
    """Works a second on a device of a type, of those that it can run."""
    seconds = [second for work in works if (second := work.seconds_on(name)) < math.inf]
    return len(seconds) / sum(seconds) if sum(seconds) > 0 else 0.0


def _paid(works: Sequence[Work], prices: dict[str, float]) -> float:
    """The least that works cost at prices."""
    classes: dict[str, list[Work]] = {}
    for number, work in enumerate(works):
        # By hand, cohorts may be of any size and mates: count them as one class without a limit.
        name = f"by hand {work.cohort}" if work.cohort else f"mates {work.mates}" if work.mates else f"alone {number}"
        classes.setdefault(name, []).append(work)
    return sum(_paid_by(mates, prices) for mates in classes.values())


def _paid_by(mates: Sequence[Work], prices: dict[str, float]) -> float:
    costs = [_cheapest(work, prices) for work in mates]
    most = len(mates) if any(work.cohort for work in mates) else max(work.members for work in mates)
    if any(work.occupancy < 1 or work.share is not None for work in mates):
        # Fractions stand beside cohorts: of each work the cheaper of both, and nothing shared.
        single = len(mates) == 1 or most == 1
        return sum(
            cost * min(max(work.share or 0.0, work.occupancy), 1.0 if single else 1 - work.shared)
            for cost, work in zip(costs, mates, strict=True)
        )
    own = sum(cost * (1 - work.shared) for cost, work in zip(costs, mates, strict=True))
    shared = sorted((cost * work.shared for cost, work in zip(costs, mates, strict=True)), reverse=True)
    return own + sum(shared[::most])


def _cheapest(work: Work, prices: dict[str, float]) -> float:
    """What a second-by-second payer pays for a work on the type that is cheapest for it."""
    return min(price * second for name, price in prices.items() if (second := work.seconds_on(name)) < math.inf)
