"""Batches made ahead by other processes.

Loader workers read nothing. This process reads every row group once, in a thread a
step ahead, and sends a worker the encoded rows of its step, which the worker decodes
(of a small split: the pixels that are kept here). So however many workers there are,
there is one copy of what a window holds (`shuffle_window` + 2 row groups a lane), or
of a small split's pixels; a worker adds `prefetch_factor` steps, encoded or made.

Workers that read for themselves were turned down: a step's rows are from all over a
window, so each worker reads and holds all of it; and if each is given a window's run
of steps, whole windows of made batches, which are larger than encoded rows, have to
be held to give them out in order.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset


class Halved(Protocol):
    """Batches that are made in two halves, of which only the first one reads."""

    def reader(self) -> "Halved":
        """A copy that may read in another thread."""

    def read(self, step: int, /) -> Any:
        """What the batch is made from."""

    def made(self, read: Any, /) -> Any:
        """The batch of what `read` gave."""

    def __getitem__(self, step: int, /) -> Any:
        """Both."""


class Ahead:
    """What the steps are made from, in order, each read while the one before is handed out."""

    def __init__(self, batches: Halved, steps: range) -> None:
        self._batches, self._steps = batches, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Any]:
        read: Callable[[int], Any] = self._batches.reader().read
        with ThreadPoolExecutor(1) as thread:
            coming: Future | None = None
            for step in self._steps:
                ready, coming = coming, thread.submit(read, step)
                if ready is not None:
                    yield ready.result()
            if coming is not None:
                yield coming.result()


class _Made(Dataset):
    """In a worker: what was read, to a batch."""

    def __init__(self, batches: Halved) -> None:
        self._batches = batches

    def __getitem__(self, read: Any) -> Any:
        return self._batches.made(read)


def load(batches: Halved, steps: range, num_workers: int, pin_memory: bool, prefetch_factor: int) -> DataLoader:
    """A loader of the batches of `steps`, in order."""
    sampler: Iterable = Ahead(batches, steps) if num_workers else steps
    dataset: Any = _Made(batches) if num_workers else batches
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        # Forking a process in which Ray runs deadlocks.
        multiprocessing_context="spawn" if num_workers else None,
        generator=torch.Generator(),  # else the loader draws a number from the global one
    )
