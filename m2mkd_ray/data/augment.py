"""What happens to images before a model sees them.

B = images, C = channels, H = W = img_size, K = classes.

Three kinds: `none` (resize, crop, normalise), `timm` (timm's ImageNet recipe, image
by image, with Pillow) and `light` (flip and shift of a whole batch at once: small
images at over ten thousand a second on one core, where Pillow and RandAugment would
be the bottleneck of a run on a CPU). Mixing and random erasing are timm's in all of
them. timm draws from the global generators, so everything random runs inside
`seeded`, which puts them back as they were.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, field_validator, model_validator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, auto_augment, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import Normalize

Kind = Literal["none", "light", "timm"]
Colour = tuple[float, float, float]
_SPELLING = (
    "It is rand, augmix, original, originalr, v0, v0r or 3a, and then settings with their values, each behind a dash. "
    "rand has m (magnitude), n (operations an image), p, mstd, mmax, inc (1: worse with magnitude), t (weights, 3a or "
    "3aw); augmix has m, w, d, a, b and mstd, all others mstd. For example rand-m9-mstd0.5-inc1; null for none"
)


class Augmentation(BaseModel, frozen=True, extra="forbid"):
    """Augmentation of training images, and the preprocessing that evaluation shares with it."""

    kind: Kind = "timm"
    hflip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip; not with kind none."""
    shift: int = Field(0, ge=0)
    """light: largest shift in pixels, drawn evenly for each axis."""
    fill: int = Field(0, ge=0, le=255)
    """light: the value of the pixels that a shift brings in."""
    recolor: bool = False
    """Read grey images as dark ink on white paper and draw both colours anew; colour images are left alone."""
    scale: tuple[float, float] = (0.08, 1.0)
    """timm: area of the random crop, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """timm: width by height of the random crop."""
    auto_augment: str | None = None
    """timm: a policy as timm writes it, such as rand-m9-mstd0.5-inc1."""
    color_jitter: float | None = None
    """timm: brightness, contrast and saturation; without effect beside auto_augment."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Of every resize, at evaluation too."""
    random_erasing: float = Field(0.0, ge=0, le=1)
    """Probability that one rectangle becomes noise (arXiv 1708.04896; timm's mode pixel, count 1)."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution that lambda is drawn from (arXiv 1710.09412); 0: none."""
    cutmix: float = Field(0.0, ge=0)
    """The same for cutmix (arXiv 1905.04899)."""
    mix_prob: float = Field(1.0, ge=0, le=1)
    """Probability that a lane's part of a batch is mixed at all."""
    switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability of cutmix where both are on."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mean: Colour = IMAGENET_DEFAULT_MEAN
    std: Colour = IMAGENET_DEFAULT_STD
    crop_pct: float | None = Field(None, gt=0, le=1)
    """Evaluation resizes to img_size / crop_pct and crops the centre; None: 224/256 for timm, otherwise 1."""

    @field_validator("auto_augment")
    @classmethod
    def _is_a_policy_of_timm(cls, policy: str | None) -> str | None:
        if policy is not None and (found := _misspelt(policy)) is not None:
            raise ValueError(f"{policy!r} is no policy that timm can read: {found}. {_SPELLING}")
        return policy

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> "Augmentation":
        idle = [
            f"{name} needs kind {kind}"
            for name, is_set, kind in (
                ("shift", self.shift > 0, "light"),
                ("auto_augment", self.auto_augment is not None, "timm"),
                ("color_jitter", self.color_jitter is not None, "timm"),
            )
            if is_set and self.kind != kind
        ]
        if idle:
            raise ValueError(f"kind is {self.kind}, but " + ", ".join(idle))
        return self

    @property
    def eval_crop(self) -> float:
        """Side of what evaluation crops, as a share of the resized image."""
        return self.crop_pct or (224 / 256 if self.kind == "timm" else 1.0)

    @property
    def is_mixing(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0


def _misspelt(policy: str) -> str | None:
    """What timm cannot read of a policy, or takes for nothing without a word (timm 1.0.31, `data/auto_augment.py`)."""
    kind, *settings = policy.split("-")
    sets = {"tweights", "t3a", "t3aw"} if kind == "rand" else set()
    nothing = [one for one in settings if one not in sets and (one[:1] == "t" or not any(map(str.isdigit, one)))]
    if not kind or nothing:
        return f"{', '.join(map(repr, nothing or [kind]))} says nothing to it"
    try:
        create_transform(32, is_training=True, auto_augment=policy)
    except (AssertionError, ValueError) as error:  # what it expects, it asserts
        return str(error) or f"it knows no {kind!r}"
    return None


IMAGENET = Augmentation(
    kind="timm",
    auto_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    random_erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
)
"""The paper's, in all its phases: the defaults of kamanphoebe/m2mKD `main.py`, from Deep Incubation, from DeiT."""


@contextmanager
def seeded(*words: int) -> Iterator[np.random.Generator]:
    """Seed Python's, NumPy's and PyTorch's (CPU) global generators by `words`; on leaving, put them back.

    Gives a generator of its own, seeded by the same words.
    """
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        reseed(*words)
        yield np.random.default_rng(words)
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def reseed(*words: int) -> None:
    """Seed the global generators inside a `seeded` block, without its cost of keeping them."""
    one, two, three = np.random.SeedSequence(words).generate_state(3).tolist()
    random.seed(one)
    np.random.seed(two)
    # torch.manual_seed would also seed CUDA, and queue a call for it in a process that has not begun to use it.
    torch.default_generator.manual_seed(three)


def train_transform(aug: Augmentation, img_size: int) -> Callable[[Image.Image], Tensor]:
    """timm's training transform: an RGB image to float32 (3, H, W); draws from the global generators."""
    transform = create_transform(
        img_size,
        is_training=True,
        scale=aug.scale,
        ratio=aug.ratio,
        hflip=aug.hflip,
        color_jitter=aug.color_jitter,  # type: ignore[arg-type]  # timm takes None, its annotation forgets it
        auto_augment=aug.auto_augment,
        interpolation=aug.interpolation,
        mean=aug.mean,
        std=aug.std,
        re_prob=aug.random_erasing,
        re_mode="pixel",
    )
    for op in operations_of(transform):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize
    return transform


def operations_of(transform: Any) -> Iterator[AugmentOp]:
    """Every operation of the policies in a composed transform, whatever timm's class of policy."""
    for step in transform.transforms:
        policy = getattr(step, "ops", None) or getattr(step, "policy", [])
        yield from (op for entry in policy for op in (entry if isinstance(entry, list | tuple) else [entry]))


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, but 0 bits make an image black, as they did until Pillow refused them; timm 1.0.31 asks for 0 bits at
    magnitude 10, which about one image in 300 meets in the paper's recipe."""
    return auto_augment.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def eval_transform(img_size: int, aug: Augmentation) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform without its last step, `normalize`: to uint8 (C, H, W)."""
    return create_transform(img_size, interpolation=aug.interpolation, crop_pct=aug.eval_crop, normalize=False)


def normalize(pixels: np.ndarray, aug: Augmentation) -> Tensor:
    """uint8 (B, H, W, C), C 1 or 3, to float32 (B, 3, H, W) of the configured mean and deviation."""
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (aug.mean, aug.std))
    return ((images - mean) / std).contiguous()  # grey images become (B, 3, H, W) here


def light(pixels: np.ndarray, aug: Augmentation, rng: np.random.Generator) -> Tensor:
    """Kinds none and light: uint8 (B, H, W, C) to float32 (B, 3, H, W), inside `seeded`."""
    images = normalize(light_pixels(pixels, aug, rng), aug)
    if (erase := erasing(aug)) is not None:
        erase(images)
    return images


def light_pixels(pixels: np.ndarray, aug: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """The part of `light` before normalisation: uint8 (B, H, W, C)."""
    if aug.kind == "light":
        pixels = _flipped_and_shifted(pixels, aug, rng)
    return recolored(pixels, rng) if aug.recolor else pixels


def erasing(aug: Augmentation) -> RandomErasing | None:
    """timm's random erasing of normalised images (B, 3, H, W) or (3, H, W), in place, inside `seeded`."""
    return RandomErasing(aug.random_erasing, mode="pixel", device="cpu") if aug.random_erasing else None


def normalized_values(aug: Augmentation) -> Tensor:
    """float32 (3, 256): what a channel's 8-bit values become, by the very arithmetic of the kind."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1)
    if aug.kind != "timm":
        return normalize(values, aug)[0, :, 0]
    *_, last = (step for step in train_transform(aug, 8).transforms if isinstance(step, Normalize))  # type: ignore[attr-defined]
    return last(torch.from_numpy(values[0, :, :, 0]).expand(3, 1, 256).float().div(255))[:, 0]


def _flipped_and_shifted(pixels: np.ndarray, aug: Augmentation, rng: np.random.Generator) -> np.ndarray:
    num_images, height, width, _ = pixels.shape
    pad = aug.shift
    padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=aug.fill)
    top, left = rng.integers(0, 2 * pad + 1, size=(2, num_images, 1))
    columns = np.where(rng.random((num_images, 1)) < aug.hflip, np.arange(width)[::-1], np.arange(width)) + left
    rows = np.arange(height) + top
    return padded[np.arange(num_images)[:, None, None], rows[:, :, None], columns[:, None, :]]


def recolored(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey images of uint8 (B, H, W, C) as dark on light, or light on dark, in random colours; (B, H, W, 3).

    One colour's channels are drawn from 0 to 127 and the other's from 128 to 255, so that the drawing can be seen.
    """
    num_images = len(pixels)
    dark, light_ = rng.uniform(0, 127, (num_images, 3)), rng.uniform(128, 255, (num_images, 3))
    swap = rng.random((num_images, 1)) < 0.5
    ink, paper = np.where(swap, light_, dark), np.where(swap, dark, light_)
    is_grey = (pixels == pixels[..., :1]).all(axis=(1, 2, 3))
    white = pixels[..., :1].astype(np.float32) / 255
    two_tone = white * paper[:, None, None] + (1 - white) * ink[:, None, None]
    return np.where(is_grey[:, None, None, None], np.rint(two_tone).astype(np.uint8), pixels)


class Mixed(NamedTuple):
    """A batch after mixing."""

    images: Tensor
    """float32 (B, 3, H, W)."""
    targets: Tensor
    """float32 (B, K)."""
    lam: float
    """Share of each image's own label, 1 if unmixed; the rest is its partner's, the image at the mirrored place."""


class _Mixup(Mixup):
    """timm's, which keeps lambda as it was corrected for the rectangle of cutmix."""

    def _mix_batch(self, x: Tensor) -> float:
        self.lam = float(super()._mix_batch(x))
        return self.lam


def mix(images: Tensor, labels: Tensor, aug: Augmentation, num_classes: int) -> Mixed:
    """timm's mixup or cutmix of a batch with itself reversed, and smoothed targets, inside `seeded`.

    `images` (B, 3, H, W) are changed in place. B is even if `aug.is_mixing`.
    """
    if not aug.is_mixing:
        return Mixed(images, mixup_target(labels, num_classes, smoothing=aug.label_smoothing), 1.0)
    mixer = _Mixup(
        mixup_alpha=aug.mixup,
        cutmix_alpha=aug.cutmix,
        prob=aug.mix_prob,
        switch_prob=aug.switch_prob,
        label_smoothing=aug.label_smoothing,
        num_classes=num_classes,
    )
    mixed, targets = mixer(images, labels)
    return Mixed(mixed, targets, mixer.lam)
