"""Who names the next point to Ray Tune, and how many at a time.

Tune pickles its searcher and the number of trials at a time with it, and a search that
is restored has both from the beginning. These look the number up instead: as many as
the cluster has room for at the moment, so it follows nodes that come and go, also
between two runs of a sweep.
"""

import inspect
from typing import Any

from ray.tune.search import SEARCH_ALG_IMPORT, ConcurrencyLimiter, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from m2mkd_ray.sweeps.bell import desk_of
from m2mkd_ray.sweeps.sweep import OptunaSearch, Sweep, TuneSearch


class _AsRoomAllows:
    """A search of Tune's for as many trials at a time as there is room for."""

    _sweep: Sweep

    @property
    def max_concurrent(self) -> int:
        """How many trials may be under way."""
        return desk_of(self._sweep).room.concurrent

    @max_concurrent.setter
    def max_concurrent(self, number: int) -> None:
        """Tune's own number is not heeded."""


class InOrder(_AsRoomAllows, BasicVariantGenerator):
    """Points that are known beforehand, in their order."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        super().__init__()


class Proposed(_AsRoomAllows, ConcurrencyLimiter):
    """Points that a searcher of Tune's proposes from the values so far."""

    def __init__(self, sweep: Sweep, searcher: Searcher) -> None:
        self._sweep = sweep
        super().__init__(searcher, max_concurrent=self.max_concurrent)


def search_of(sweep: Sweep, *, in_order: bool) -> InOrder | Proposed:
    """Tune's search for a sweep; `in_order`: all its points are known (`draw.drawn`)."""
    return InOrder(sweep) if in_order else Proposed(sweep, searcher_of(sweep.searcher))


def searcher_of(chosen: Any) -> Searcher:
    """The searcher of Tune's that a sweep names.

    Raises:
        ImportError: its package is not installed.
        TypeError: it takes no such arguments.
    """
    match chosen:
        case OptunaSearch(seed=seed):
            kind, arguments = SEARCH_ALG_IMPORT["optuna"](), {"seed": seed}
        case TuneSearch(name=name, arguments=given):
            kind, arguments = SEARCH_ALG_IMPORT[name](), dict(given)
        case _:
            raise TypeError(f"{chosen.kind} proposes nothing: its points are drawn beforehand.")
    inspect.signature(kind).bind(**arguments)
    return kind(**arguments)
