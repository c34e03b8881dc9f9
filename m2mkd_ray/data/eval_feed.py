"""Batches for evaluation: a split in order, without augmentation.

B = images, H = W = img_size
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m2mkd_ray.data import corruptions
from m2mkd_ray.data.augment import Augmentation, eval_transform, normalize
from m2mkd_ray.data.index import DatasetFolder
from m2mkd_ray.data.lanes import balanced
from m2mkd_ray.data.loader import load
from m2mkd_ray.data.pixels import Pixels


class EvalRows(NamedTuple):
    """What a batch for evaluation is made from."""

    chosen: np.ndarray
    """int64 (n,), places among the rows that are evaluated."""
    images: np.ndarray | list[bytes]
    """uint8 (n, H, W, C), or encoded."""


class EvalBatches(Dataset[tuple[Tensor, Tensor]]):
    """A split in order, for evaluation: iterates (images float32 (B, 3, H, W), labels int64 (B,))."""

    def __init__(
        self,
        folder: DatasetFolder,
        split: str,
        *,
        img_size: int,
        batch_size: int,
        augmentation: Augmentation,
        corruption: tuple[str, int, int] | None = None,
        max_rows: int | None = None,
    ) -> None:
        """
        Args:
            augmentation: of the training; resize, crop and normalisation are its.
            corruption: name, severity 1 to 5, and seed: spoil every image, resized and cropped, by that.
            max_rows: at most this many rows, drawn class by class in turns (the same for the same number).

        Raises:
            DataError: the data set has no such split.
            UsageError: there is no such corruption or severity.
        """
        if corruption is not None:
            corruptions.check(*corruption[:2])
        self._batch_size, self._augmentation, self._corruption = batch_size, augmentation, corruption
        self._rows = rows = folder.rows(split)
        self._used = np.arange(len(rows)) if max_rows is None else balanced(rows.labels, max_rows, seed=0)
        self.labels = rows.labels[self._used]
        """int64 (num_rows,)."""
        self._pixels = Pixels(rows, img_size, eval_transform(img_size, augmentation), self._used, name=split)

    @property
    def num_rows(self) -> int:
        """Images that are evaluated."""
        return len(self._used)

    def __len__(self) -> int:
        """Batches; the last may be smaller."""
        return -(-self.num_rows // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.made(self.read(batch))

    def read(self, batch: int) -> EvalRows:
        """The first half of `batches[batch]`: its rows."""
        return self._read(np.arange(self.num_rows)[batch * self._batch_size :][: self._batch_size])

    def made(self, read: EvalRows) -> tuple[Tensor, Tensor]:
        """The second half: images and labels; reads nothing."""
        return normalize(self._pictures(read), self._augmentation), torch.from_numpy(self.labels[read.chosen])

    def reader(self) -> "EvalBatches":
        """A copy that may read in another thread."""
        other = copy.copy(self)
        other._rows = copy.copy(self._rows)  # without its cache
        return other

    def loader(
        self, *, num_workers: int = 0, pin_memory: bool = False, prefetch_factor: int = 2
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """The same batches, made ahead by `num_workers` processes.

        A small split is decoded once and kept, so this process makes its batches sooner than workers would start.
        """
        num_workers = 0 if self._pixels.are_kept else num_workers
        return load(self, range(len(self)), num_workers, pin_memory, prefetch_factor)

    def picture(self, number: int) -> np.ndarray:
        """Image `number` (of `num_rows`) as the model sees it, before normalisation: uint8 (H, W, 3)."""
        pixels = self._pictures(self._read(np.array([number])))[0]
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()

    def _read(self, chosen: np.ndarray) -> EvalRows:
        rows = self._used[chosen]
        return EvalRows(chosen, self._pixels(rows) if self._pixels.are_kept else self._rows.read(rows))

    def _pictures(self, read: EvalRows) -> np.ndarray:
        rows = self._used[read.chosen]
        pixels = self._pixels.of(rows, read.images)
        if self._corruption is None:
            return pixels
        name, severity, seed = self._corruption
        seeds = [np.random.SeedSequence([seed, row]).generate_state(1).item() for row in rows.tolist()]
        spoil = partial(corruptions.corrupt, name=name, severity=severity)
        return np.stack([spoil(image, seed=own) for image, own in zip(pixels, seeds)])
