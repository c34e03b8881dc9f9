"""Decide what runs where and when: pure functions from works and devices to a schedule.

Works are first put into *forms*: alone, several as a cohort, several side by side on
fractions of a device, one over several devices. A form is then laid out longest first,
each bundle where it *ends* earliest (Graham 1969, longest processing time; on devices of
mixed speeds, earliest completion time: Ibarra and Kim 1977). A bundle may so wait for a
fast device instead of starting at once on a slow one that would end later. The best of
a few forms wins, and is then improved by swaps in its order while that helps.

Makespans within `SAME` of the best count as equal, because costs are not known better;
among them the fewest device-hours win, so cohorts and fractions are used where they
pay and a work is spread over several devices only where that ends the whole earlier.

On m identical devices the layout ends within 4/3 - 1/(3m) of the optimum (Graham
1969); with many works a device, within one short work of the lower bound. An integer
program was turned down: it needs a solver and seconds, and this is asked again
whenever a work ends or a node comes or goes.

Spot devices count as slower by `SPOT_LOSS`, so that of equal places the longest works
get those that stay.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from m2mkd_ray.errors import PlanError
from m2mkd_ray.execution.planning.bounds import lower_bound, refusals
from m2mkd_ray.execution.planning.forms import Bundle, Fleet, cohorts, fractions, of_works, singles, widened
from m2mkd_ray.execution.planning.layout import Booking, Layout, lay_out
from m2mkd_ray.execution.planning.works import Device, Work

Policy = Literal["auto", "alone", "cohort"]
SAME = 0.01
"""Makespans that differ by less are the same."""
SPOT_LOSS = 0.02
"""Expected share of a spot device's work that is done twice: preempted about every two hours, it loses half of the
minute between two checkpoints and a minute or two until another worker has started."""
_CHOICES = 256
"""Choices of widths that are all tried."""
_FEW = 12
"""Of so many mates every number of cohorts is tried."""
BUDGET = 6_000
"""Most placements of a bundle that improving a schedule may take, below 0.1 s: thousands of orders of a few works, a
few of many, where the longest first is good already."""


@dataclass(frozen=True)
class Schedule:
    """What runs where and when."""

    bookings: tuple[Booking, ...]
    """In the order in which they were decided: longest first."""
    devices: tuple[Device, ...]
    bound_s: float
    """No schedule of these works on these devices ends earlier (`bounds.lower_bound`)."""
    placements: int
    """How often a bundle was placed to find it: the cost of planning, without a clock."""

    @property
    def makespan_s(self) -> float:
        """Seconds until the last work ends."""
        return max((booking.end_s for booking in self.bookings), default=0.0)

    @property
    def device_s(self) -> float:
        """Seconds of devices used; a fraction counts as such."""
        return sum(booking.device_s for booking in self.bookings)

    @property
    def utilisation(self) -> float:
        """Share of all devices' time until the end that is used."""
        whole = self.makespan_s * len(self.devices)
        return self.device_s / whole if whole else 0.0


def schedule(
    works: Sequence[Work],
    devices: Sequence[Device],
    *,
    policy: Policy = "auto",
    spot_loss: float = SPOT_LOSS,
    budget: int = BUDGET,
) -> Schedule:
    """Place every work once.

    Args:
        works: what is to run; what was decided by hand (`cohort`, `share`, a single width) is kept.
        devices: where, with what they are busy with.
        policy: auto: the best form. alone: every work on a device of its own. cohort: as large cohorts as fit.
        spot_loss: share of a spot device's work that is done twice.
        budget: most placements of a bundle for improving the best form.

    Raises:
        PlanError: works that no device can take, with the reason of each.
    """
    if problems := refusals(works, devices):
        raise PlanError("\n".join(problems.values()))
    fleet = Fleet(devices, spot_loss)
    bound = lower_bound(works, devices)
    search = _Search(fleet, bound, budget)
    for bundles, slots in _forms(works, fleet, policy):
        search.consider(bundles, slots)
    if policy == "auto":
        search.improve()
    best = search.best()
    return Schedule(tuple(best.bookings), tuple(devices), bound, search.placements)


def _forms(works: Sequence[Work], fleet: Fleet, policy: Policy) -> Iterator[tuple[list[Bundle], int]]:
    """Forms to lay out: bundles, and the number of slots that devices are cut into."""
    by_hand, free = of_works(works, fleet)
    slots = _slots([bundle.share for bundle in by_hand])
    if policy == "cohort":
        yield by_hand + cohorts(free, fleet, min(_cohort_counts(free, len(fleet.devices)), default=1)), slots
        return
    yield by_hand + singles(free, fleet), slots
    if policy == "alone":
        return
    for widths in _widths(free):
        bundles = [fleet.bundle([work], width) for work, width in zip(free, widths, strict=True)]
        if all(bundle.can_run for bundle in bundles):
            yield by_hand + bundles, slots
    for count in _cohort_counts(free, len(fleet.devices)):
        yield by_hand + cohorts(free, fleet, count), slots
    if slots == 1:
        for cut in _cuts(free, fleet):
            yield by_hand + fractions(free, fleet, cut), cut


def _slots(shares: Sequence[float]) -> int:
    """The fewest equal parts of a device of which all shares are whole numbers; of odd shares, as many as the least
    of them goes into it."""
    whole = (cut for cut in range(1, 21) if all(abs(share * cut - round(share * cut)) < 1e-6 for share in shares))
    return next(whole, math.ceil(1 / min(shares, default=1.0) - 1e-9))


def _widths(works: Sequence[Work]) -> Iterator[Sequence[int]]:
    """Widths of all works to try: of few works every choice, of many only those where all are as wide."""
    choices = [sorted(work.widths) for work in works]
    if 1 < math.prod(len(each) for each in choices) <= _CHOICES:
        yield from product(*choices)
    elif len({*map(tuple, choices)}) == 1 and works:
        yield from ([width] * len(works) for width in choices[0][1:])


def _cohort_counts(works: Sequence[Work], num_devices: int) -> list[int]:
    """Numbers of cohorts that are worth a look: the least first; none where nobody has mates.

    As many as cohorts of 2, 3, ... members make; whole multiples of the devices, so that all end together; and of
    few works every number.
    """
    mates = [work for work in works if work.mates and work.members > 1 and 1 in work.widths]
    if len(mates) < 2:
        return []
    most = max(work.members for work in mates)
    least = -(-len(mates) // most)
    counts = {-(-len(mates) // size) for size in range(2, most + 1)}
    rounds = [count for count in range(num_devices, len(mates), num_devices) if count >= least]
    every = range(least, len(mates)) if len(mates) <= _FEW else ()
    return sorted(counts.union(rounds[:most], every))


def _cuts(works: Sequence[Work], fleet: Fleet) -> list[int]:
    """Numbers of slots that let some work run on less than a device."""
    most = min(max((device.slots for device in fleet.devices), default=1), 16)
    wanted = {int(1 / work.occupancy + 1e-9) for work in works if 0 < work.occupancy <= 0.5}
    return sorted({cut for want in wanted for cut in {min(want, most), min(want, most) // 2} if cut > 1})


@dataclass(frozen=True)
class _Found:
    bundles: list[Bundle]
    slots: int
    layout: Layout

    @property
    def makespan_s(self) -> float:
        return self.layout.makespan_s


class _Search:
    """The forms that were laid out, and the best of them."""

    def __init__(self, fleet: Fleet, bound_s: float, budget: int) -> None:
        self._fleet, self._bound_s, self._budget = fleet, bound_s, budget
        self._found: list[_Found] = []
        self.placements = 0

    def consider(self, bundles: list[Bundle], slots: int) -> None:
        """Lay a form out, longest first."""
        ordered = sorted(bundles, key=lambda bundle: -bundle.least_s)
        self._found.append(self._lay_out(ordered, slots))

    def best(self) -> Layout:
        """The layout with the fewest device-seconds among those whose makespans are the same as the shortest."""
        least = min(found.makespan_s for found in self._found)
        return min(
            (found.layout for found in self._found if found.makespan_s <= least * (1 + SAME)),
            key=lambda layout: (layout.device_s, layout.makespan_s),
        )

    def improve(self) -> None:
        """Swap and spread while it helps and the budget lasts: alone, and the best of the other forms."""
        end = self.placements + self._budget
        starts = sorted(self._found[1:], key=lambda found: found.makespan_s)[:3]
        for found in [self._found[0], *starts]:
            for step in (self._swapped, self._spread, self._swapped):
                found = step(found, end)
            self._found.append(found)

    def _lay_out(self, bundles: list[Bundle], slots: int) -> _Found:
        self.placements += len(bundles)
        return _Found(bundles, slots, lay_out(bundles, self._fleet, slots))

    def _is_good(self, found: _Found) -> bool:
        return found.makespan_s <= self._bound_s * (1 + SAME)

    def _swapped(self, found: _Found, end: int) -> _Found:
        """Swap, in the order, bundles of the device that ends last with others, while that ends everything earlier."""
        is_better = True
        while is_better and not self._is_good(found):
            is_better = False
            late = found.layout.last_places()
            pairs = [(i, j) for i in late for j in range(len(found.bundles)) if i != j]
            for i, j in pairs:
                if self.placements >= end:
                    return found
                bundles = list(found.bundles)
                bundles[i], bundles[j] = bundles[j], bundles[i]
                tried = self._lay_out(bundles, found.slots)
                if tried.layout.ends() < found.layout.ends():
                    found, is_better = tried, True
                    break
        return found

    def _spread(self, found: _Found, end: int) -> _Found:
        """Give the bundle that ends last more devices, while that ends everything earlier."""
        start = found
        while not self._is_good(found):
            place = found.layout.last_place()
            better = self._wider(found, place, end)
            if better is None:
                break
            found = better
        return found if found.makespan_s < start.makespan_s * (1 - SAME) else start

    def _wider(self, found: _Found, place: int, end: int) -> _Found | None:
        """The layout with one bundle on the fewest more devices that end everything earlier; None if none do."""
        for bundle in widened(found.bundles[place], self._fleet):
            if self.placements >= end:
                return None
            tried = self._with(found, place, bundle)
            if tried.layout.ends() < found.layout.ends():
                return tried
        return None

    def _with(self, found: _Found, place: int, bundle: Bundle) -> _Found:
        """The better of two orders: the wider bundle in its old place, or first of all."""
        rest = [*found.bundles[:place], *found.bundles[place + 1 :]]
        orders = ([*found.bundles[:place], bundle, *found.bundles[place + 1 :]], [bundle, *rest])
        return min((self._lay_out(bundles, found.slots) for bundles in orders), key=lambda each: each.layout.ends())
