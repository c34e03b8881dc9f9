"""Batches for training.

B = images, C = 3, H = W = img_size, K = classes.

A batch is a pure function of (seed, step): not of the number of ranks or
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

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m2mkd_ray.data.augment import (
    Augmentation,
    eval_transform,
    light,
    mix,
    recolored,
    reseed,
    seeded,
    train_transform,
)
from m2mkd_ray.data.index import DatasetFolder
from m2mkd_ray.data.lanes import Lanes, balanced
from m2mkd_ray.data.loader import load
from m2mkd_ray.data.pixels import SMALL, Pixels, decode
from m2mkd_ray.errors import UsageError

_SAMPLE, MIX = 3, 4
"""First words of the seeds, so that two uses never share their numbers (1 and 2: `lanes.py`)."""


class Batch(NamedTuple):
    """A rank's part of a training batch, and what it was made from."""

    images: Tensor
    """float32 (B, 3, H, W), normalised."""
    targets: Tensor
    """float32 (B, K), each row adds up to 1."""
    rows: Tensor
    """int64 (B,), the numbers of the images' rows."""
    partners: Tensor
    """int64 (B,), the row that each image was mixed with; its own if it was not."""
    lam: Tensor
    """float32 (B,), the share of the image's own label (mixup's and cutmix's lambda); 1 if it was not mixed."""


class LaneRows(NamedTuple):
    """What a lane's part of a batch is made from."""

    lane: int
    step: int
    rows: np.ndarray
    """int64 (n,), numbers of the rows."""
    epochs: np.ndarray
    """int64 (n,), the lane's epoch that each is in."""
    images: np.ndarray | list[bytes]
    """uint8 (n, H, W, C), or encoded."""


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
    views: int | None = Field(None, gt=0, exclude_if=lambda views: views is None)
    """Repeat the batches of the first `views` epochs, so that what is computed from a batch (a teacher's logits) can
    be kept: an image has at most so many views. Rows that those epochs leave out (fewer than a batch's, each) are
    never seen. None: a new view every epoch."""

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
        self.num_classes = folder.index.num_classes
        self._rows = folder.rows(config.split, cached_groups=len(self._my_lanes) * (config.shuffle_window + 2))
        if self._rows.encoded_bytes <= SMALL:
            self._rows.cached_groups = len(self._rows.row_groups)
        self.labels = self._rows.labels
        """Of every row of the split, int64."""
        used = np.arange(len(self._rows))
        if config.max_rows is not None:
            used = balanced(self.labels, config.max_rows, config.subset_seed)
        self.num_rows = len(used)
        """Rows of an epoch, of all ranks together."""
        starts = [group.start for group in self._rows.row_groups[1:]]
        groups = [group for group in np.split(used, np.searchsorted(used, starts)) if len(group)]
        self._lanes = Lanes(groups, config.lanes, config.shuffle_window, config.seed)
        augmentation, size = config.augmentation, config.img_size
        self._transform = train_transform(augmentation, size)
        to_size = eval_transform(size, augmentation)
        self._pixels = Pixels(self._rows, size, to_size, used, name=config.split, on_demand=True)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch, at least one."""
        return max(1, self.num_rows // self.config.batch_size)

    def __getitem__(self, step: int) -> Batch:
        return self.made(self.read(step))

    @property
    def decodes_anew(self) -> bool:
        """Whether images are decoded for every batch, not once for all of them."""
        return not self._keeps_pixels

    @property
    def decodes(self) -> int:
        """Images that this process has decoded for it."""
        return self._pixels.decodes

    @property
    def counts(self) -> dict[str, int]:
        """What has been done so far, for who counts it."""
        return {"decodes": self.decodes}

    def cycled(self, step: int) -> int:
        """The first step that has the same batch."""
        views = self.config.views
        return step if views is None else step % (views * self.steps_per_epoch)

    def arrays(self, step: int) -> tuple[np.ndarray, ...]:
        """`batches[step]` as arrays, for `shared.from_arrays`."""
        return tuple(tensor.numpy() for tensor in self[step])

    def read(self, step: int) -> list[LaneRows]:
        """The first half of `batches[step]`: its rows, of each lane."""
        step = self.cycled(step)
        return [self._read(lane, step) for lane in self._my_lanes]

    def made(self, lanes: list[LaneRows]) -> Batch:
        """The second half: images and targets; reads nothing."""
        parts = [self._made(lane) for lane in lanes]
        return parts[0] if len(parts) == 1 else Batch(*(torch.cat(tensors) for tensors in zip(*parts)))

    def reader(self) -> "Batches":
        """A copy that may read in another thread; it shares the pixels that are kept."""
        other = copy.copy(self)
        other._rows, other._lanes = copy.copy(self._rows), copy.copy(self._lanes)  # without their caches
        return other

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
        return load(self, range(start, stop), num_workers, pin_memory, prefetch_factor)

    @property
    def _keeps_pixels(self) -> bool:
        return self._pixels.are_kept and self.config.augmentation.kind != "timm"

    def _read(self, lane: int, step: int) -> LaneRows:
        count = self.config.rows_per_lane
        rows, epochs = self._lanes.take(lane, step * count, count)
        images = self._pixels(rows) if self._keeps_pixels else self._rows.read(rows)
        return LaneRows(lane, step, rows, epochs, images)

    def pictures(self, read: LaneRows) -> Iterator[Image.Image]:
        """Kind timm: its images in RGB, not augmented; each when it is asked for, with the generators seeded for it.

        Inside `seeded`.
        """
        for epoch, row, encoded in zip(read.epochs.tolist(), read.rows.tolist(), read.images, strict=True):
            words = (_SAMPLE, self.config.seed, read.lane, epoch, row)
            reseed(*words)
            self._pixels.decodes += 1
            image = decode(encoded, f"Row {row} of split {self.config.split}").convert("RGB")
            yield _recolored(image, words) if self.config.augmentation.recolor else image

    def pixels(self, read: LaneRows) -> np.ndarray:
        """Kinds none and light: its images in uint8 (n, H, W, C), not augmented."""
        return self._pixels.of(read.rows, read.images)

    def _made(self, read: LaneRows) -> Batch:
        config, words = self.config, (MIX, self.config.seed, read.lane, read.step)
        labels = torch.from_numpy(self.labels[read.rows])
        with seeded(*words) as rng:
            if config.augmentation.kind == "timm":
                images = torch.stack([self._transform(picture) for picture in self.pictures(read)])
                reseed(*words)
            else:
                images = light(self.pixels(read), config.augmentation, rng)
            return mixed_batch(images, labels, torch.from_numpy(read.rows), config, self.num_classes)


def mixed_batch(images: Tensor, labels: Tensor, rows: Tensor, config: FeedConfig, num_classes: int) -> Batch:
    """The batch of a lane's images, which are mixed in place; inside `seeded`."""
    mixed = mix(images, labels, config.augmentation, num_classes)
    partners = rows if mixed.lam == 1 else rows.flip(0)
    return Batch(mixed.images, mixed.targets, rows, partners.clone(), torch.full((len(rows),), mixed.lam))


def _recolored(image: Image.Image, words: tuple[int, ...]) -> Image.Image:
    pixels = recolored(np.asarray(image)[None], np.random.default_rng(words))
    return Image.fromarray(pixels[0])
