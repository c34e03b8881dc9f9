"""Batches for training and for evaluation.

B = images, C = 3, H = W = img_size, K = classes.

A training batch is a pure function of (seed, step): not of the number of ranks or
loader workers, nor of where a run was killed and went on. So that this costs no
memory and no seeking, rows are not permuted as a whole. Row groups are dealt to
*lanes* (l, l + lanes, ...). A lane is an endless stream: in each of its epochs its
row groups are permuted, put together in windows, and the rows of a window are
permuted, so that only a window's row groups are held at a time. A step takes
`batch_size / lanes` rows from every lane, and rank r of w has the lanes r, r + w, ...:
with as many lanes as a run will ever have ranks, any number of them makes the same
batches. A lane is what one GPU's batch is in the reference, so mixing stays in a lane.

A loader over a permutation of all rows was turned down (a random read a row), and
so was a shuffle buffer (what it holds depends on the past, so a resumed run would
have to read all that came before).
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m2mkd_ray.data import corruptions
from m2mkd_ray.data.augment import (
    Augmentation,
    eval_transform,
    light,
    mix,
    normalize,
    recolored,
    reseed,
    seeded,
    train_transform,
)
from m2mkd_ray.data.index import DatasetFolder
from m2mkd_ray.data.lanes import Lanes, balanced
from m2mkd_ray.data.pixels import SMALL, Pixels, decode
from m2mkd_ray.errors import UsageError

_SAMPLE, _MIX = 3, 4
"""First words of the seeds, so that two uses never share their numbers (1 and 2: `lanes.py`)."""


class Batch(NamedTuple):
    """A rank's part of a training batch."""

    images: Tensor
    """float32 (B, 3, H, W), normalised."""
    targets: Tensor
    """float32 (B, K), each row adds up to 1."""


class FeedConfig(BaseModel, frozen=True, extra="forbid"):
    """All that decides the training batches."""

    dataset: str
    split: str = "train"
    max_rows: int | None = Field(None, gt=0)
    """Train on this many rows, drawn class by class in turns; None: on all."""
    subset_seed: int = Field(0, ge=0)
    """Of the rows that `max_rows` draws: apart from `seed`, so that runs that differ in it share their rows."""
    batch_size: int = Field(gt=0)
    """Images a step, of all ranks together."""
    lanes: int = Field(1, gt=0)
    """Streams that a batch is made of; the largest number of ranks that a run may have."""
    shuffle_window: int = Field(16, gt=0)
    """Row groups of a lane whose rows are mixed, and held in memory."""
    img_size: int = Field(gt=0)
    augmentation: Augmentation = Augmentation()
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _lanes_divide_the_batch(self) -> "FeedConfig":
        if self.batch_size % self.lanes:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of lanes {self.lanes}")
        if self.augmentation.is_mixing and self.rows_per_lane % 2:
            raise ValueError(
                f"mixup and cutmix mix pairs in a lane, but batch_size {self.batch_size} in {self.lanes} lanes "
                f"gives {self.rows_per_lane} images each, an odd number"
            )
        return self

    @property
    def rows_per_lane(self) -> int:
        """Images that a step takes from each lane."""
        return self.batch_size // self.lanes


class Batches(Dataset[Batch]):
    """A rank's training batches: `batches[step]`, for any step from 0 on."""

    def __init__(self, config: FeedConfig, folder: DatasetFolder, rank: int = 0, world: int = 1) -> None:
        """
        Raises:
            DataError: the data set has no such split, or fewer row groups than lanes.
            UsageError: the lanes cannot be shared evenly by `world` ranks.
        """
        if config.lanes % world or not 0 <= rank < world:
            raise UsageError(
                f"{config.lanes} lanes cannot be shared evenly by {world} ranks (rank {rank}). "
                "Set `lanes` to a multiple of the ranks; it changes the batches, so choose it before the first run."
            )
        self.config = config
        self._my_lanes = range(rank, config.lanes, world)
        self._num_classes = folder.index.num_classes
        self._rows = folder.rows(config.split, cached_groups=len(self._my_lanes) * (config.shuffle_window + 2))
        if self._rows.encoded_bytes <= SMALL:
            self._rows.cached_groups = len(self._rows.row_groups)
        self._labels = self._rows.labels
        used = np.arange(len(self._rows))
        if config.max_rows is not None:
            used = balanced(self._labels, config.max_rows, config.subset_seed)
        self.num_rows = len(used)
        """Rows of an epoch, of all ranks together."""
        starts = [group.start for group in self._rows.row_groups[1:]]
        groups = [group for group in np.split(used, np.searchsorted(used, starts)) if len(group)]
        self._lanes = Lanes(groups, config.lanes, config.shuffle_window, config.seed)
        augmentation, size = config.augmentation, config.img_size
        self._transform = train_transform(augmentation, size)
        self._pixels = Pixels(self._rows, size, eval_transform(size, augmentation), used, name=config.split)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch, at least one."""
        return max(1, self.num_rows // self.config.batch_size)

    def __getitem__(self, step: int) -> Batch:
        parts = [self._lane(lane, step) for lane in self._my_lanes]
        return parts[0] if len(parts) == 1 else Batch(*(torch.cat(tensors) for tensors in zip(*parts)))

    def loader(
        self,
        start: int,
        stop: int,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
    ) -> DataLoader[Batch]:
        """The batches of the steps `start` to `stop` (exclusive), in order, made ahead by `num_workers` processes."""
        return _loader(self, range(start, stop), num_workers, pin_memory, prefetch_factor)

    def _lane(self, lane: int, step: int) -> Batch:
        config, count = self.config, self.config.rows_per_lane
        rows, epochs = self._lanes.take(lane, step * count, count)
        labels = torch.from_numpy(self._labels[rows])
        with seeded(_MIX, config.seed, lane, step) as rng:
            if config.augmentation.kind == "timm":
                images = torch.stack([self._sample(lane, *at) for at in zip(epochs.tolist(), rows.tolist())])
                reseed(_MIX, config.seed, lane, step)
            else:
                images = light(self._pixels(rows), config.augmentation, rng)
            return Batch(*mix(images, labels, config.augmentation, self._num_classes))

    def _sample(self, lane: int, epoch: int, row: int) -> Tensor:
        words = (_SAMPLE, self.config.seed, lane, epoch, row)
        reseed(*words)
        image = decode(self._rows.read([row])[0], f"Row {row} of split {self.config.split}").convert("RGB")
        if self.config.augmentation.recolor:
            image = _recolored(image, words)
        return self._transform(image)


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
        rows = folder.rows(split)
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
        chosen = np.arange(self.num_rows)[batch * self._batch_size :][: self._batch_size]
        return normalize(self._pictures(chosen), self._augmentation), torch.from_numpy(self.labels[chosen])

    def loader(
        self, *, num_workers: int = 0, pin_memory: bool = False, prefetch_factor: int = 2
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """The same batches, made ahead by `num_workers` processes."""
        return _loader(self, range(len(self)), num_workers, pin_memory, prefetch_factor)

    def picture(self, number: int) -> np.ndarray:
        """Image `number` (of `num_rows`) as the model sees it, before normalisation: uint8 (H, W, 3)."""
        pixels = self._pictures(np.array([number]))[0]
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()

    def _pictures(self, chosen: np.ndarray) -> np.ndarray:
        rows = self._used[chosen]
        pixels = self._pixels(rows)
        if self._corruption is None:
            return pixels
        name, severity, seed = self._corruption
        seeds = [np.random.SeedSequence([seed, row]).generate_state(1).item() for row in rows.tolist()]
        spoil = partial(corruptions.corrupt, name=name, severity=severity)
        return np.stack([spoil(image, seed=own) for image, own in zip(pixels, seeds)])


def _loader(batches: Dataset, steps: range, num_workers: int, pin_memory: bool, prefetch_factor: int) -> DataLoader:
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        # Forking a process in which Ray runs deadlocks.
        multiprocessing_context="spawn" if num_workers else None,
        generator=torch.Generator(),  # else the loader draws a number from the global one
    )


def _recolored(image: Image.Image, words: tuple[int, ...]) -> Image.Image:
    pixels = recolored(np.asarray(image)[None], np.random.default_rng(words))
    return Image.fromarray(pixels[0])
