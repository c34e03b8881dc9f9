"""Lay bundles out on devices: list scheduling, each bundle where it ends earliest.

Devices are cut into equal slots, one where nothing is fractional. The devices of a
class wait in a heap by when their first slot is free, so a bundle costs the number of
classes and a logarithm; only bundles that want several slots or devices look at all.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from m2mkd_ray.execution.planning.forms import Bundle, Fleet
from m2mkd_ray.execution.planning.works import Work


@dataclass(frozen=True)
class Booking:
    """A bundle's place and time."""

    works: tuple[Work, ...]
    """More than one: a cohort."""
    devices: tuple[int, ...]
    """Their places in the list of devices; more than one: it is spread over them."""
    share: float
    """What it has of each."""
    start_s: float
    end_s: float

    @property
    def device_s(self) -> float:
        """Seconds of devices that it uses; a fraction counts as such."""
        return len(self.devices) * self.share * (self.end_s - self.start_s)


@dataclass
class Layout:
    """Bookings, one a bundle and in the bundles' order."""

    bookings: list[Booking] = field(default_factory=list)

    @cached_property
    def makespan_s(self) -> float:
        """When the last ends."""
        return max((booking.end_s for booking in self.bookings), default=0.0)

    @cached_property
    def device_s(self) -> float:
        """Seconds of devices used."""
        return sum(booking.device_s for booking in self.bookings)

    def ends(self) -> tuple[float, ...]:
        """When bundles end, latest first: what a better layout has less of."""
        return tuple(sorted((round(booking.end_s, 6) for booking in self.bookings), reverse=True))

    def last_place(self) -> int:
        """The bundle that ends last."""
        return max(range(len(self.bookings)), key=lambda place: self.bookings[place].end_s)

    def last_places(self) -> list[int]:
        """The bundles on the devices of the one that ends last, the latest first."""
        devices = set(self.bookings[self.last_place()].devices)
        places = [place for place, booking in enumerate(self.bookings) if devices.intersection(booking.devices)]
        return sorted(places, key=lambda place: -self.bookings[place].end_s)


def lay_out(bundles: Sequence[Bundle], fleet: Fleet, slots: int = 1) -> Layout:
    """Place bundles in their order, each where it ends earliest.

    Args:
        bundles: each can run on some class.
        fleet: the devices.
        slots: equal parts of a device; a bundle takes as many as its share needs.
    """
    board = _Board(fleet, slots)
    return Layout([board.place(bundle) for bundle in bundles])


class _Board:
    """When each slot of each device is free."""

    def __init__(self, fleet: Fleet, slots: int) -> None:
        self._fleet = fleet
        self._cuts = [max(1, min(slots, device.slots)) for device in fleet.devices]
        self._free = [_free_slots(device.busy, cut) for device, cut in zip(fleet.devices, self._cuts, strict=True)]
        self._heaps = [[(self._free[number][0], number) for number in members] for members in fleet.members]
        for heap in self._heaps:
            heapq.heapify(heap)

    def place(self, bundle: Bundle) -> Booking:
        """Book the place where the bundle ends earliest; of equal ones, that on a device that stays."""
        best: tuple[float, bool, float, tuple[int, ...]] | None = None
        for place, seconds in enumerate(bundle.seconds):
            if seconds == math.inf:
                continue
            start, devices = self._first(bundle, place)
            option = (start + seconds, self._fleet.classes[place].spot, start, devices)
            if best is None or option < best:
                best = option
        assert best is not None, f"no class of device can take {[work.name for work in bundle.works]}"
        end, _, start, devices = best
        taken = max(self._take(number, bundle.share, end) for number in devices)
        if bundle.works[0].share is not None:
            taken = bundle.share  # by hand: what slots round up to stays free
        return Booking(bundle.works, devices, taken, start, end)

    def _first(self, bundle: Bundle, place: int) -> tuple[float, tuple[int, ...]]:
        """When the bundle can start on a class of device, and on which."""
        if bundle.width > 1:
            return self._first_together(bundle.width, place)
        members = self._fleet.members[place]
        if self._needs(members[0], bundle.share) == 1:
            heap = self._heaps[place]
            while heap[0][0] != self._free[heap[0][1]][0]:
                heapq.heappop(heap)
            return heap[0][0], (heap[0][1],)
        start, number = min((self._free[number][self._needs(number, bundle.share) - 1], number) for number in members)
        return start, (number,)

    def _first_together(self, width: int, place: int) -> tuple[float, tuple[int, ...]]:
        by_node: dict[str, list[tuple[float, int]]] = {}
        for number in self._fleet.members[place]:
            by_node.setdefault(self._fleet.devices[number].node, []).append((self._free[number][-1], number))
        together = [sorted(free)[:width] for free in by_node.values() if len(free) >= width]
        chosen = min(together, key=lambda free: (free[-1][0], free))
        return chosen[-1][0], tuple(number for _, number in chosen)

    def _needs(self, number: int, share: float) -> int:
        return max(1, math.ceil(share * self._cuts[number] - 1e-6))

    def _take(self, number: int, share: float, end: float) -> float:
        """Book slots of a device until `end`; returns the share that they are."""
        needed = self._needs(number, share)
        free = self._free[number]
        free[:needed] = [end] * needed
        free.sort()
        place = self._fleet.class_of[number]
        heapq.heappush(self._heaps[place], (free[0], number))
        return needed / self._cuts[number]


def _free_slots(busy: Sequence[tuple[float, float]], cut: int) -> list[float]:
    """When each slot is free, soonest first."""
    until = [end for share, end in busy for _ in range(max(1, math.ceil(share * cut - 1e-6)))]
    kept = sorted(until, reverse=True)[:cut]
    return sorted(kept + [0.0] * (cut - len(kept)))
