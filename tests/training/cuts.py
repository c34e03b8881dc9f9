"""A training whose worker goes away."""

from collections.abc import Iterator
from typing import Any

from m2mkd_ray.data import Batch, Batches


class Killed(Exception):
    """The worker went away."""


class Cut:
    """A feed that ends at a step, as a worker that is killed there."""

    def __init__(self, feed: Batches, at: int) -> None:
        self.feed, self.at, self.steps_per_epoch = feed, at, feed.steps_per_epoch

    def loader(self, start: int, stop: int, **settings: Any) -> Iterator[Batch]:
        for step, batch in enumerate(self.feed.loader(start, stop, **settings), start=start):
            if step == self.at:
                raise Killed
            yield batch
