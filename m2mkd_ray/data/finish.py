"""The device's part of the augmentation: from a draft to a batch, on the device that trains.

Mirroring, timm's operations, normalisation, erasing and mixing. The result is what `Batches` makes, bit for bit on a
CPU; on a GPU, too, all is whole numbers, double precision, or one rounding at a time. Images that have the same
operation go through it together, and nothing waits for the device.

B = images, S = img_size, K = classes
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from m2mkd_ray.data.augment import normalized_values, seeded
from m2mkd_ray.data.draft import Draft, Drafts
from m2mkd_ray.data.feed import MIX, Batch, FeedConfig, mixed_batch
from m2mkd_ray.data.shared import SharedDrafts
from m2mkd_ray.data.tensor_ops import OPERATIONS, apply


class Finisher:
    """Finishes the drafts of a feed on a device."""

    def __init__(self, config: FeedConfig, num_classes: int, device: torch.device) -> None:
        self._config, self._num_classes, self._device = config, num_classes, device
        augmentation = config.augmentation
        self._values = normalized_values(augmentation).to(device)  # (3, 256)
        fill = [min(255, round(255 * mean)) for mean in augmentation.mean]
        self._fill = torch.tensor(fill, dtype=torch.uint8, device=device)
        """As timm's `create_transform` has it. Made once: a copy from a list waits for the device."""

    def __call__(self, draft: Draft) -> Batch:
        """Images and targets are on the device; what they were made from stays on the CPU."""
        pixels = draft.pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)  # (B, 3, S, S)
        flips = draft.flips.to(self._device, non_blocking=True).view(-1, 1, 1, 1)
        pixels = self._operated(torch.where(flips, pixels.flip(-1), pixels), draft)
        channels = zip(self._values, pixels.unbind(1), strict=True)
        images = torch.stack([values[of_channel.long()] for values, of_channel in channels], dim=1)
        self._erase(images, draft)
        return self._mixed(images, draft)

    def _operated(self, pixels: Tensor, draft: Draft) -> Tensor:
        """In place."""
        interpolation = self._config.augmentation.interpolation
        for operations, arguments in zip(draft.operations.unbind(1), draft.arguments.unbind(1), strict=True):
            for number in sorted(set(operations.tolist()) - {-1}):
                places = (operations == number).nonzero().squeeze(1)
                there = places.to(self._device, non_blocking=True)
                done = apply(
                    OPERATIONS[number],
                    pixels.index_select(0, there),
                    arguments[places],
                    fill=self._fill,
                    interpolation=interpolation,
                )
                pixels.index_copy_(0, there, done)
        return pixels

    def _erase(self, images: Tensor, draft: Draft) -> None:
        noise, at = draft.noise.to(self._device, non_blocking=True), 0
        for image, (top, left, height, width) in zip(images, draft.boxes.tolist(), strict=True):
            size = 3 * height * width
            if size:
                erased = noise[at : at + size].view(3, height, width)
                image[:, top : top + height, left : left + width] = erased
            at += size

    def _mixed(self, images: Tensor, draft: Draft) -> Batch:
        config, lanes = self._config, draft.lanes.tolist()
        parts = []
        for of_lane, labels, rows, (lane, step) in zip(
            images.chunk(len(lanes)), draft.labels.chunk(len(lanes)), draft.rows.chunk(len(lanes)), lanes, strict=True
        ):
            with seeded(MIX, config.seed, lane, step):
                parts.append(mixed_batch(of_lane, labels, rows, config, self._num_classes))
        # Images are mixed in place.
        targets, rows, partners, lam = map(torch.cat, zip(*(part[1:] for part in parts), strict=True))
        return Batch(images, targets.to(self._device, non_blocking=True), rows, partners, lam)


class OnDevice:
    """A feed whose batches are finished on a device: those of `Batches`, already there."""

    def __init__(self, drafts: Drafts | SharedDrafts, device: torch.device) -> None:
        self._drafts = drafts
        self._finish = Finisher(drafts.config, drafts.num_classes, device)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch, at least one."""
        return self._drafts.steps_per_epoch

    @property
    def counts(self) -> dict[str, int]:
        """What has been done so far, for who counts it."""
        return self._drafts.counts

    def loader(self, start: int, stop: int, *, num_workers: int = 0, pin_memory: bool = False) -> Iterator[Batch]:
        """The batches of the steps `start` to `stop` (exclusive), in order."""
        return map(self._finish, self._drafts.loader(start, stop, num_workers=num_workers, pin_memory=pin_memory))
