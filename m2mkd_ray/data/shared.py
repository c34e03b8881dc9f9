"""Batches that are made once for several trainings: by a stream of arrays, which another room gives.

A batch follows from the step alone, so whoever makes it, it is the same. Arrays are
what travels, because processes can map them without a copy.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from m2mkd_ray.data.draft import Draft, Drafts, Drawer
from m2mkd_ray.data.feed import Batch, Batches, FeedConfig
from m2mkd_ray.data.index import DatasetFolder

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class BatchMaker:
    """Makes a rank's batches as arrays, in whatever process it is called; small and picklable."""

    config: FeedConfig
    folder: Path
    """Of the data set; the same on every node."""
    rank: int = 0
    world: int = 1
    is_draft: bool = False
    """Whether it makes drafts, for a device to finish."""
    here: Batches | None = field(default=None, compare=False, repr=False)
    """The batches of this process, if there are some already; stays behind when it is pickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return BatchMaker, (self.config, self.folder, self.rank, self.world, self.is_draft)

    def __call__(self) -> Callable[[int], Arrays]:
        """The function from a step to its arrays.

        Raises:
            DataError: the data set cannot be read.
        """
        here = self.here or Batches(self.config, DatasetFolder.open(self.folder), self.rank, self.world)
        return Drafts(here).arrays if self.is_draft else here.arrays


class Handed(Protocol):
    """What a stream gives for a step."""

    @property
    def arrays(self) -> Arrays:
        """Of `Batches.arrays`."""

    @property
    def is_own(self) -> bool:
        """Whether they were made in this process."""

    @property
    def is_first(self) -> bool:
        """Whether they were made elsewhere, and nobody has taken them before."""


Stream = Callable[[str, BatchMaker, int, int, int], Iterator[Handed]]
"""Gives `maker()(step)` for the steps `start` to `stop`, by (key, maker, start, stop, workers); one key, one result.
As many steps are made at the same time as `workers` says, one at least."""


class SharedBatches:
    """A feed whose batches come from a stream: those of `Batches`, bit for bit."""

    def __init__(
        self,
        config: FeedConfig,
        folder: DatasetFolder,
        stream: Stream,
        rank: int = 0,
        world: int = 1,
        *,
        is_draft: bool = False,
    ) -> None:
        """
        Raises:
            DataError, UsageError: as `Batches`.
        """
        self._batches = Batches(config, folder, rank, world)
        self._stream = stream
        self._maker = BatchMaker(config, folder.path.absolute(), rank, world, is_draft, self._batches)
        self.key = stream_key(config, folder, rank, world, is_draft=is_draft)
        """Of the stream: all that decides its arrays."""
        self.own = self.handed = 0
        """Batches that were made in this process, and those that were made elsewhere."""
        self._decoded_for_us = 0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch, at least one."""
        return self._batches.steps_per_epoch

    @property
    def decodes(self) -> int:
        """Images that this process has decoded, and those that were decoded for it before anybody else had them.

        So those of all who read a stream add up to what was decoded on their node.
        """
        return self._batches.decodes + self._decoded_for_us

    @property
    def counts(self) -> dict[str, int]:
        """What has been done so far, for who counts it."""
        return {"decodes": self.decodes, "own_batches": self.own}

    def loader(self, start: int, stop: int, *, num_workers: int = 0, pin_memory: bool = False) -> Iterator[Batch]:
        """The batches of the steps `start` to `stop` (exclusive), in order.

        Their memory may be shared with other processes: they must not be changed in place.

        Args:
            num_workers: processes that make them ahead, for all who read the stream; 0: one.
        """
        for arrays in self.arrays(start, stop, num_workers):
            yield Batch(*_tensors(arrays, pin_memory))

    def arrays(self, start: int, stop: int, num_workers: int = 0) -> Iterator[Arrays]:
        """The arrays of these steps."""
        for step, made in enumerate(self._stream(self.key, self._maker, start, stop, num_workers), start):
            self.own, self.handed = self.own + made.is_own, self.handed + (not made.is_own)
            # Pixels that are kept were decoded in the first epoch.
            if made.is_first and (self._batches.decodes_anew or step < self.steps_per_epoch):
                self._decoded_for_us += len(made.arrays[0])
            yield made.arrays


class SharedDrafts:
    """The same for drafts, which a device finishes: those of `Drafts`."""

    def __init__(
        self, config: FeedConfig, folder: DatasetFolder, stream: Stream, rank: int = 0, world: int = 1
    ) -> None:
        """
        Raises:
            DataError: as `Batches`.
            UsageError: as `Batches`, and as `Drafts`.
        """
        self._shared = SharedBatches(config, folder, stream, rank, world, is_draft=True)
        self.config, self.num_classes = config, folder.index.num_classes
        Drawer(config.augmentation, config.img_size)  # what cannot be drawn is told here, not by who makes them

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch, at least one."""
        return self._shared.steps_per_epoch

    @property
    def counts(self) -> dict[str, int]:
        """What has been done so far, for who counts it."""
        return self._shared.counts

    def loader(self, start: int, stop: int, *, num_workers: int = 0, pin_memory: bool = False) -> Iterator[Draft]:
        """The drafts of the steps `start` to `stop` (exclusive), in order; see `SharedBatches.loader`."""
        for arrays in self._shared.arrays(start, stop, num_workers):
            yield Draft(*_tensors(arrays, pin_memory))


def stream_key(
    config: FeedConfig, folder: DatasetFolder, rank: int = 0, world: int = 1, *, is_draft: bool = False
) -> str:
    """Twelve hex digits that stand for a rank's batches, or their drafts."""
    decides = [config.model_dump(mode="json"), folder.index.fingerprint, rank, world, *(["draft"] if is_draft else [])]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def from_arrays(arrays: Sequence[np.ndarray]) -> Batch:
    """The batch of `Batches.arrays`, on the same memory; it must not be changed where that is read only."""
    return Batch(*_tensors(arrays, pin_memory=False))


def _tensors(arrays: Sequence[np.ndarray], pin_memory: bool) -> list[Tensor]:
    tensors = [_tensor(array) for array in arrays]
    return [tensor.pin_memory() for tensor in tensors] if pin_memory else tensors


class _Memory:
    """An array's memory for NumPy, as one that may be written: torch has no tensors that may not, and warns."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Memory(array)))
