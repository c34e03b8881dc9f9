"""What is to be placed, and on what: works and devices, as plain numbers.

A *work* is one stage, or whatever else runs for a known time; a *device* is a GPU, or
as many CPU cores as a work asks for. Times are in seconds from now.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from m2mkd_ray.execution.planning.devices import same_type

ANY = ""
"""Stands for every type of device that is not named."""


@dataclass(frozen=True)
class Work:
    """Something to run once."""

    name: str
    seconds: Mapping[str, float]
    """How long it takes alone on one device, by type of device; a type that is missing (and no `ANY`) or
    infinite: it cannot."""
    memory_gb: Mapping[str, float] = field(default_factory=dict)
    """Memory of the device that it needs, by type; a type that is missing (and no `ANY`): none."""
    mates: str = ""
    """Works of equal, non-empty `mates` may be members of one cohort."""
    members: int = 1
    """Most members of a cohort that it may be in."""
    shared: float = 0.0
    """Share of its seconds that a cohort spends once for all members (decoding, frozen prefix), 0 to 1."""
    occupancy: float = 1.0
    """Share of a device that it keeps busy alone, 0 to 1: several such works run side by side at full speed."""
    widths: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    """Numbers of devices that it may run on, and their efficiency, at most 1: n devices take seconds / (n e)."""
    start_s: float = 0.0
    """Seconds more that it takes on several devices, whatever their number."""
    cohort: str = ""
    """By hand: works of equal, non-empty `cohort` run together, whatever it costs."""
    share: float | None = None
    """By hand: the share of a device that it gets."""

    def seconds_on(self, type_name: str) -> float:
        """Seconds alone on one device of a type; infinite where it cannot run."""
        return _of_type(self.seconds, type_name, math.inf)

    def tells_of(self, type_name: str) -> bool:
        """Whether it says how long it takes on a type, or that it cannot run there."""
        return _of_type(self.seconds, type_name, -1.0) >= 0

    def memory_on(self, type_name: str) -> float:
        """GB of a device of a type."""
        return _of_type(self.memory_gb, type_name, 0.0)


@dataclass(frozen=True)
class Device:
    """A GPU, or the CPU cores that a work gets."""

    node: str
    """Id of its node."""
    type: str
    memory_gb: float = math.inf
    spot: bool = False
    """Whether it may be taken away at any time."""
    slots: int = 1
    """Most works side by side on it: what its share of the node's CPU cores can feed."""
    busy: tuple[tuple[float, float], ...] = ()
    """What is at work on it: (share of it, seconds until that ends)."""


def together_s(works: Sequence[Work], type_name: str) -> float:
    """Seconds of a cohort on one device: what members do for themselves, and the longest of what they share.

    The prefix is run once up to the deepest member and every image is decoded once, so the shared part of a
    cohort is that of the member with the most. Of one work it is `seconds`; infinite where a member cannot run.
    """
    seconds = [work.seconds_on(type_name) for work in works]
    if math.inf in seconds:
        return math.inf
    own = sum(each * (1 - work.shared) for each, work in zip(seconds, works, strict=True))
    return own + max(each * work.shared for each, work in zip(seconds, works, strict=True))


def _of_type(values: Mapping[str, float], type_name: str, otherwise: float) -> float:
    if type_name in values:
        return values[type_name]
    for name, value in values.items():
        if name != ANY and same_type(name, type_name):
            return value
    return values.get(ANY, otherwise)
