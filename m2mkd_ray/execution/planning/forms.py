"""Forms of works: which of them run as one bundle, and what of a device each bundle takes."""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from m2mkd_ray.execution.planning.works import Device, Work, together_s


@dataclass(frozen=True)
class DeviceClass:
    """What devices may have in common: all that decides how long a bundle takes on them."""

    type: str
    memory_gb: float
    spot: bool
    slots: int


@dataclass(frozen=True)
class Bundle:
    """Works that run as one."""

    works: tuple[Work, ...]
    seconds: tuple[float, ...]
    """On each class of device; infinite where it cannot run."""
    width: int = 1
    """Devices that it takes, all of one node and class."""
    share: float = 1.0
    """What it takes of each."""

    @cached_property
    def least_s(self) -> float:
        """Seconds on the class that suits it best."""
        return min(self.seconds)

    @property
    def can_run(self) -> bool:
        """Whether any class can take it."""
        return self.least_s < math.inf


class Fleet:
    """The devices, by class.

    Args:
        devices: all of them.
        spot_loss: share of a spot device's work that is done twice.
    """

    def __init__(self, devices: Sequence[Device], spot_loss: float) -> None:
        self.devices = tuple(devices)
        self.spot_loss = spot_loss
        of = [DeviceClass(device.type, device.memory_gb, device.spot, device.slots) for device in devices]
        self.classes = tuple(dict.fromkeys(of))
        places = {each: place for place, each in enumerate(self.classes)}
        self.class_of = tuple(places[each] for each in of)
        """The place of each device's class."""
        self.members: tuple[list[int], ...] = tuple([] for _ in self.classes)
        for number, place in enumerate(self.class_of):
            self.members[place].append(number)
        nodes = [Counter(self.devices[number].node for number in members) for members in self.members]
        self.widest = tuple(max(counts.values()) for counts in nodes)
        """Devices of each class on the node that has the most."""

    def bundle(self, works: Sequence[Work], width: int = 1, share: float = 1.0) -> Bundle:
        """Works as one bundle: several are a cohort on one device, one may be spread over `width` devices."""
        return Bundle(
            tuple(works), tuple(self._seconds(works, place, width, share) for place in range(len(self.classes))),
            width, share,
        )  # fmt: skip

    def _seconds(self, works: Sequence[Work], place: int, width: int, share: float) -> float:
        of = self.classes[place]
        # A cohort is counted with all of its members' memory, though they share the prefix.
        needs = sum(work.memory_on(of.type) for work in works)
        if width > self.widest[place] or needs > of.memory_gb * share * (1 + 1e-9):
            return math.inf
        seconds = together_s(works, of.type)
        if width > 1:
            seconds = works[0].start_s + seconds / (width * works[0].widths[width])
        # Less of a device than it keeps busy alone makes a work slower.
        seconds *= max(1.0, works[0].occupancy / share) if share < 1 else 1.0
        return seconds * (1 + self.spot_loss if of.spot else 1)


def of_works(works: Sequence[Work], fleet: Fleet) -> tuple[list[Bundle], list[Work]]:
    """Bundles that were decided by hand, and the works that are left to decide about."""
    named: dict[str, list[Work]] = {}
    bundles, free = [], []
    for work in works:
        if work.cohort:
            named.setdefault(work.cohort, []).append(work)
        elif work.share is not None:
            bundles.append(fleet.bundle([work], share=work.share))
        else:
            free.append(work)
    return bundles + [fleet.bundle(members) for members in named.values()], free


def singles(works: Sequence[Work], fleet: Fleet) -> list[Bundle]:
    """Every work a bundle on the fewest devices that it may have."""
    return [fleet.bundle([work], min(work.widths)) for work in works]


def widened(bundle: Bundle, fleet: Fleet) -> list[Bundle]:
    """The bundle on more devices, in every way that it may."""
    if len(bundle.works) > 1 or bundle.share < 1:
        return []
    wider = (fleet.bundle(bundle.works, width) for width in sorted(bundle.works[0].widths) if width > bundle.width)
    return [each for each in wider if each.can_run]


def fractions(works: Sequence[Work], fleet: Fleet, slots: int) -> list[Bundle]:
    """Works that keep at most 1 / slots of a device busy get that share, where memory permits; others are alone."""
    bundles = []
    for work in works:
        bundle = fleet.bundle([work], share=1 / slots)
        fits = work.occupancy * slots <= 1 + 1e-9 and 1 in work.widths and bundle.can_run
        bundles.append(bundle if fits else fleet.bundle([work], min(work.widths)))
    return bundles


def cohorts(works: Sequence[Work], fleet: Fleet, count: int) -> list[Bundle]:
    """About `count` cohorts of mates, as even as may be; works without mates are alone.

    Longest first, each to the cohort that is shortest so far and still takes it, as
    works are laid out on devices; more cohorts are begun where none takes it.
    """
    by_mates: dict[str, list[Work]] = {}
    for work in works:
        by_mates.setdefault(work.mates if work.members > 1 and 1 in work.widths else "", []).append(work)
    bundles = singles(by_mates.pop("", []), fleet)
    total = sum(len(mates) for mates in by_mates.values())
    for mates in by_mates.values():
        bundles += _cohorts_of(mates, fleet, max(1, round(count * len(mates) / total)))
    return bundles


def _cohorts_of(mates: Sequence[Work], fleet: Fleet, count: int) -> list[Bundle]:
    groups = [_Group(fleet) for _ in range(count)]
    shortest = [(0.0, place) for place in range(count)]
    seconds = {id(work): fleet.bundle([work]).least_s for work in mates}
    for work in sorted(mates, key=lambda work: -seconds[id(work)]):
        place = _place_for(work, groups, shortest, fleet)
        groups[place].add(work)
        heapq.heappush(shortest, (groups[place].least_s, place))
    return [fleet.bundle(group.works) for group in groups if group.works]


def _place_for(work: Work, groups: list["_Group"], shortest: list[tuple[float, int]], fleet: Fleet) -> int:
    """The shortest group that takes the work, which is taken off the heap; a new group where none does."""
    refused = []
    while shortest:
        entry = heapq.heappop(shortest)
        group = groups[entry[1]]
        if len(group.works) >= min(group.most, work.members):
            continue  # it is full, and stays so
        if group.takes(work):
            break
        refused.append(entry)
    else:
        groups.append(_Group(fleet))
        entry = (0.0, len(groups) - 1)
    for each in refused:
        heapq.heappush(shortest, each)
    return entry[1]


class _Group:
    """A cohort that grows: its sums on each class, so that a member more costs the classes and not the members."""

    def __init__(self, fleet: Fleet) -> None:
        self.works: list[Work] = []
        self.most = 1 << 30
        self._classes = fleet.classes
        self._own = [0.0] * len(fleet.classes)
        self._shared = [0.0] * len(fleet.classes)
        self._memory = [0.0] * len(fleet.classes)

    @property
    def least_s(self) -> float:
        """Seconds on the class that suits it best; infinite ones are those that cannot take it."""
        return min(own + shared for own, shared in zip(self._own, self._shared, strict=True))

    def takes(self, work: Work) -> bool:
        """Whether some class can run the group with one more."""
        return any(
            own + work.seconds_on(each.type) < math.inf
            and memory + work.memory_on(each.type) <= each.memory_gb * (1 + 1e-9)
            for own, memory, each in zip(self._own, self._memory, self._classes, strict=True)
        )

    def add(self, work: Work) -> None:
        """Take one more."""
        self.works.append(work)
        self.most = min(self.most, work.members)
        for place, each in enumerate(self._classes):
            self._memory[place] += work.memory_on(each.type)
            fits = self._memory[place] <= each.memory_gb * (1 + 1e-9)
            seconds = work.seconds_on(each.type) if fits else math.inf
            if seconds == math.inf:
                self._own[place] = math.inf
                continue
            self._own[place] += seconds * (1 - work.shared)
            self._shared[place] = max(self._shared[place], seconds * work.shared)
