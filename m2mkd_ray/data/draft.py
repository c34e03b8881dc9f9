"""Batches whose augmentation is drawn, but only begun: what is left is arithmetic for the device that trains.

timm's own code draws everything, in its own order, from the same seeds as where it also does it (`augment.py`): its
operations are replaced by ones that note down what they are asked for. Images come decoded, cropped and resized by
Pillow, in 8 bits: under a third of what a finished batch weighs.

B = images, S = img_size, O = operations an image has at most
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ColorJitter, Normalize, RandomHorizontalFlip

from m2mkd_ray.data.augment import Augmentation, erasing, light_pixels, operations_of, seeded, train_transform
from m2mkd_ray.data.feed import MIX, Batches, LaneRows
from m2mkd_ray.data.loader import load
from m2mkd_ray.data.tensor_ops import OPERATIONS
from m2mkd_ray.errors import UsageError

_NONE = -1
_JITTERS = ("brightness", "contrast", "color")
"""What torchvision's ColorJitter numbers, as timm's operations; hue, its fourth, cannot be set."""


class Draft(NamedTuple):
    """A rank's part of a training batch before the device's part of the augmentation, and what that is to do."""

    pixels: Tensor
    """uint8 (B, S, S, 3)."""
    flips: Tensor
    """bool (B,): mirror it."""
    operations: Tensor
    """int64 (B, O): places in `OPERATIONS`, in the order in which they are done; -1: none."""
    arguments: Tensor
    """float64 (B, O)."""
    boxes: Tensor
    """int64 (B, 4), top, left, height and width of what is erased; 0: nothing."""
    noise: Tensor
    """float32: what it becomes, 3 * height * width of every image, one after the other."""
    labels: Tensor
    """int64 (B,)."""
    rows: Tensor
    """int64 (B,), the numbers of the images' rows."""
    lanes: Tensor
    """int64 (lanes, 2): each lane's number, and the step; B / lanes images in a row are of a lane."""


class Drawn(NamedTuple):
    """What is drawn for an image."""

    pixels: np.ndarray
    """uint8 (S, S, 3)."""
    flip: bool
    operations: list[tuple[int, float]]
    box: tuple[int, int, int, int]
    noise: Tensor


class _Canvas:
    """In an image's place: notes down what timm's RandomErasing erases."""

    dtype = torch.float32

    def __init__(self, side: int) -> None:
        self._side = side
        self.box, self.noise = (0, 0, 0, 0), torch.zeros(0)

    def size(self) -> tuple[int, int, int]:
        """Of the image."""
        return 3, self._side, self._side

    def __setitem__(self, place: tuple[slice, slice, slice], noise: Tensor) -> None:
        _, rows, columns = place
        self.box = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        self.noise = noise.flatten()


class Drawer:
    """Draws what happens to training images."""

    def __init__(self, augmentation: Augmentation, img_size: int) -> None:
        """
        Raises:
            UsageError: the augmentation has something that only Pillow can do.
        """
        self._side, self._noted = img_size, list[tuple[int, float]]()
        self._erase = erasing(augmentation)
        self._steps: list[Any] = []
        self.most = 0
        """Operations that an image has at most."""
        if augmentation.kind != "timm":
            return
        if problem := undrawable(augmentation):
            raise UsageError(problem)
        transform = train_transform(augmentation, img_size)
        self._steps = transform.transforms  # type: ignore[attr-defined]  # timm's Compose, typed as any callable
        for operation in operations_of(transform):
            noted = OPERATIONS.index(NAME_TO_OP[operation.name].__name__)
            operation.aug_fn = partial(self._note, noted)  # type: ignore[assignment]  # timm's field has no type
        self.most = sum(_most_of(step) for step in self._steps)

    def of(self, image: Image.Image) -> Drawn:
        """Kind timm: what happens to an RGB image; draws from the global generators, as timm's transform does."""
        self._noted, flip, canvas = [], False, _Canvas(self._side)
        for step in self._steps:
            if isinstance(step, RandomHorizontalFlip):
                flip = bool(step(torch.tensor([[0, 1]]))[0, 0])  # whether it mirrors this
            elif isinstance(step, ColorJitter):
                self._jitter(step)
            elif isinstance(step, RandomErasing):
                step(canvas)
            elif not isinstance(step, MaybeToTensor | Normalize):
                image = step(image)
        return Drawn(np.asarray(image), flip, self._noted, canvas.box, canvas.noise)

    def of_light(self, pixels: np.ndarray) -> list[Drawn]:
        """Kinds none and light: what is erased of images uint8 (n, S, S, 3); draws as timm's does of a batch."""
        canvases = [_Canvas(self._side) for _ in pixels]
        if self._erase is not None:
            for canvas in canvases:
                self._erase(canvas)
        pairs = zip(pixels, canvases, strict=True)
        return [Drawn(image, flip=False, operations=[], box=one.box, noise=one.noise) for image, one in pairs]

    def _note(self, operation: int, image: Image.Image, argument: float = 0.0, **_: Any) -> Image.Image:
        self._noted.append((operation, float(argument)))
        return image

    def _jitter(self, step: ColorJitter) -> None:
        order, *factors = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
        for kind in order.tolist():
            factor = factors[kind]
            if factor is not None:
                self._noted.append((OPERATIONS.index(_JITTERS[kind]), float(factor)))


def undrawable(augmentation: Augmentation) -> str | None:
    """A sentence if the augmentation has something that only Pillow can do; else None."""
    if augmentation.kind != "timm":
        return None
    transform = train_transform(augmentation, 32)
    known = (
        RandomResizedCropAndInterpolation, RandomHorizontalFlip, RandAugment, AutoAugment,
        ColorJitter, MaybeToTensor, Normalize, RandomErasing,
    )  # fmt: skip
    missing = {type(step).__name__ for step in transform.transforms if not isinstance(step, known)}  # type: ignore[attr-defined]
    missing |= {one.name for one in operations_of(transform) if NAME_TO_OP[one.name].__name__ not in OPERATIONS}
    if not missing:
        return None
    return (
        f"auto_augment {augmentation.auto_augment!r} has {', '.join(sorted(missing))}, which only Pillow can do; a "
        f"device can {', '.join(OPERATIONS)}. Choose another policy, such as rand-m9-mstd0.5-inc1, or leave "
        f"augment_on_device off."
    )


class Drafts(Dataset[Draft]):
    """The drafts of a rank's batches: `drafts[step]`, for any step from 0 on."""

    def __init__(self, batches: Batches) -> None:
        """
        Raises:
            UsageError: the augmentation has something that only Pillow can do.
        """
        self._batches, self.config, self.num_classes = batches, batches.config, batches.num_classes
        self._drawer = Drawer(batches.config.augmentation, batches.config.img_size)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch, at least one."""
        return self._batches.steps_per_epoch

    @property
    def counts(self) -> dict[str, int]:
        """What has been done so far, for who counts it."""
        return self._batches.counts

    def __getitem__(self, step: int) -> Draft:
        return self.made(self.read(step))

    def arrays(self, step: int) -> tuple[np.ndarray, ...]:
        """`drafts[step]` as arrays, for `SharedDrafts`."""
        return tuple(tensor.numpy() for tensor in self[step])

    def read(self, step: int) -> list[LaneRows]:
        """The first half of `drafts[step]`: its rows, of each lane."""
        return self._batches.read(step)

    def made(self, lanes: list[LaneRows]) -> Draft:
        """The second half; reads nothing."""
        parts = [self._made(lane) for lane in lanes]
        return parts[0] if len(parts) == 1 else Draft(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def reader(self) -> "Drafts":
        """A copy that may read in another thread."""
        return Drafts(self._batches.reader())

    def loader(self, start: int, stop: int, *, num_workers: int = 0, pin_memory: bool = False) -> DataLoader[Draft]:
        """The drafts of the steps `start` to `stop` (exclusive), in order, made ahead by `num_workers` processes."""
        return load(self, range(start, stop), num_workers, pin_memory, prefetch_factor=2)

    def _made(self, read: LaneRows) -> Draft:
        batches, most = self._batches, self._drawer.most
        with seeded(MIX, self.config.seed, read.lane, read.step) as rng:
            if self.config.augmentation.kind == "timm":
                drawn = [self._drawer.of(picture) for picture in batches.pictures(read)]
            else:
                pixels = light_pixels(batches.pixels(read), self.config.augmentation, rng)
                drawn = self._drawer.of_light(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))
        padded = [[*one.operations, *[(_NONE, 0.0)] * (most - len(one.operations))] for one in drawn]
        table = torch.tensor(padded, dtype=torch.float64).view(len(drawn), most, 2)
        return Draft(
            pixels=torch.from_numpy(np.stack([one.pixels for one in drawn])),
            flips=torch.tensor([one.flip for one in drawn]),
            operations=table[..., 0].long(),
            arguments=table[..., 1].contiguous(),
            boxes=torch.tensor([one.box for one in drawn]),
            noise=torch.cat([one.noise for one in drawn]),
            labels=torch.from_numpy(batches.labels[read.rows]),
            rows=torch.from_numpy(read.rows),
            lanes=torch.tensor([[read.lane, read.step]]),
        )


def _most_of(step: Callable[..., Any]) -> int:
    if isinstance(step, RandAugment):
        return int(step.num_layers)
    if isinstance(step, AutoAugment):
        return max(len(one) for one in step.policy)
    return len(_JITTERS) if isinstance(step, ColorJitter) else 0
