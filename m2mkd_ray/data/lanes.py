"""Which rows a step takes: a pure function of (seed, lane, position), see `feed.py`."""

from collections.abc import Sequence

import numpy as np

from m2mkd_ray.errors import DataError

_ORDER, _SUBSET = 1, 2
"""First words of the seeds, so that two uses never share their numbers."""
_UNEVEN = 1.1
"""By how much the largest lane may exceed the smallest: every batch takes as much of each, so as much more often
would the smallest one's rows be seen."""


class Lanes:
    """The row groups of a split, dealt to endless streams of rows."""

    def __init__(self, groups: Sequence[np.ndarray], lanes: int, window: int, seed: int) -> None:
        """
        Args:
            groups: row numbers of each row group.
            window: row groups whose rows are mixed.

        Raises:
            DataError: a lane would have no rows.
        """
        if len(groups) < lanes:
            raise DataError(
                f"{lanes} lanes need at least {lanes} row groups, but the split has {len(groups)}. "
                "Set `lanes` lower, or import the data set again with smaller row groups (--rows-per-group)."
            )
        self._groups = _dealt(groups, lanes)
        self.sizes = [sum(map(len, of_lane)) for of_lane in self._groups]
        """Rows of each lane."""
        self._window, self._seed = window, seed
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_orders": {}}

    def take(self, lane: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows `start` to `start + count` of the lane's stream, and the lane's epoch that each is in."""
        positions = np.arange(start, start + count)
        epochs, places = np.divmod(positions, self.sizes[lane])
        rows = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            rows[chosen] = self._order(lane, epoch)[places[chosen]]
        return rows, epochs

    def _order(self, lane: int, epoch: int) -> np.ndarray:
        if (lane, epoch) not in self._orders:
            for stale in [key for key in self._orders if key[0] == lane and abs(key[1] - epoch) > 1]:
                del self._orders[stale]
            self._orders[lane, epoch] = self._drawn(lane, epoch)
        return self._orders[lane, epoch]

    def _drawn(self, lane: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([_ORDER, self._seed, lane, epoch])
        groups = self._groups[lane]
        order = rng.permutation(len(groups))
        windows = [order[start : start + self._window] for start in range(0, len(order), self._window)]
        return np.concatenate([rng.permutation(np.concatenate([groups[g] for g in window])) for window in windows])


def _dealt(groups: Sequence[np.ndarray], lanes: int) -> list[list[np.ndarray]]:
    """The row groups of each lane: l, l + lanes, ...; if that is too uneven, some are cut between two lanes."""
    whole = [list(groups[lane::lanes]) for lane in range(lanes)]
    sizes = [sum(map(len, of_lane)) for of_lane in whole]
    if max(sizes) <= _UNEVEN * min(sizes):
        return whole
    in_order = [group for of_lane in whole for group in of_lane]
    ends = np.cumsum([len(group) for group in in_order])
    parts = np.array_split(np.concatenate(in_order), lanes)
    starts = np.cumsum([0, *map(len, parts)])
    return [
        np.split(part, ends[(ends > start) & (ends < stop)] - start)
        for part, start, stop in zip(parts, starts, starts[1:])
    ]


def balanced(labels: np.ndarray, max_rows: int, seed: int) -> np.ndarray:
    """Numbers of at most `max_rows` rows, ascending, drawn class by class in turns as long as a class has any."""
    drawn = np.random.default_rng([_SUBSET, seed]).permutation(len(labels))
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(by_class[np.argsort(turn, kind="stable")[:max_rows]])
