"""Corruptions that shift a test set (Hendrycks & Dietterich, arXiv 1903.12261).

H, W, C = height, width and channels (1 or 3). Noise, contrast, brightness, JPEG and
pixelation have the parameters of ImageNet-C (github.com/hendrycks/robustness,
`make_imagenet_c.py`); blur has CIFAR-10-C's, scaled from 32 pixels to the image's
side, so that small images survive it. Rotation, translation and inversion are not
in the paper; they follow MNIST-C's idea (arXiv 1906.02337) with strengths of our own.
"""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from m2mkd_ray.errors import UsageError

Pixels = np.ndarray
"""float32 (H, W, C) in [0, 1], or uint8 (H, W, C)."""


@dataclass(frozen=True)
class Corruption:
    """A way to spoil an image, and its strength at the severities 1 to 5."""

    apply: Callable[[Pixels, float, np.random.Generator], Pixels]
    strengths: tuple[float, float, float, float, float]
    meaning: str


def _gaussian_noise(x: Pixels, std: float, rng: np.random.Generator) -> Pixels:
    return x + rng.normal(size=x.shape, scale=std)


def _shot_noise(x: Pixels, photons: float, rng: np.random.Generator) -> Pixels:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    hit, salt = rng.random((2, *x.shape))
    return np.where(hit < amount, np.where(salt < 0.5, 0.0, 1.0), x)


def _gaussian_blur(x: Pixels, of_side: float, rng: np.random.Generator) -> Pixels:
    radius = of_side * min(x.shape[:2])
    return _through_pillow(x, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def _pixelate(x: Pixels, keep: float, rng: np.random.Generator) -> Pixels:
    def coarse(image: Image.Image) -> Image.Image:
        small = (max(1, int(image.width * keep)), max(1, int(image.height * keep)))
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)

    return _through_pillow(x, coarse)


def _jpeg(x: Pixels, quality: float, rng: np.random.Generator) -> Pixels:
    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return _through_pillow(x, compressed)


def _contrast(x: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _brightness(x: Pixels, shift: float, rng: np.random.Generator) -> Pixels:
    return x + shift


def _invert(x: Pixels, threshold: float, rng: np.random.Generator) -> Pixels:
    return np.where(x >= threshold, 1 - x, x)


def _rotate(x: Pixels, degrees: float, rng: np.random.Generator) -> Pixels:
    angle, paper = degrees * rng.choice((-1, 1)), _paper(x)
    return _through_pillow(x, lambda image: image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=paper))


def _translate(x: Pixels, of_side: float, rng: np.random.Generator) -> Pixels:
    angle = rng.uniform(0, 2 * np.pi)
    by = of_side * min(x.shape[:2]) * np.array([np.cos(angle), np.sin(angle)])
    affine, paper = (1, 0, -by[0], 0, 1, -by[1]), _paper(x)
    return _through_pillow(
        x,
        lambda image: image.transform(
            image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=paper
        ),
    )


def _paper(x: Pixels) -> tuple[int, ...]:
    """The median colour of the border: what is moved in looks like more of the background."""
    border = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
    return tuple(int(value) for value in np.rint(np.median(border, axis=0) * 255))


def _through_pillow(x: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    pixels = np.rint(x * 255).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if x.shape[-1] == 1 else pixels)
    return np.asarray(change(image), dtype=np.float32).reshape(x.shape) / 255


CORRUPTIONS = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), "standard deviation"),
    "shot_noise": Corruption(_shot_noise, (60, 25, 12, 5, 3), "photons of a white pixel"),
    "impulse_noise": Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), "share of the values"),
    "gaussian_blur": Corruption(_gaussian_blur, (0.4 / 32, 0.6 / 32, 0.7 / 32, 0.8 / 32, 1 / 32), "sigma by side"),
    "pixelate": Corruption(_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), "share of the side that is kept"),
    "jpeg": Corruption(_jpeg, (25, 18, 15, 10, 7), "quality"),
    "contrast": Corruption(_contrast, (0.4, 0.3, 0.2, 0.1, 0.05), "factor"),
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), "added to every value"),
    "invert": Corruption(_invert, (0.8, 0.6, 0.4, 0.2, 0.0), "from which value on"),
    "rotate": Corruption(_rotate, (10, 20, 30, 40, 50), "degrees, to either side"),
    "translate": Corruption(_translate, (0.05, 0.1, 0.15, 0.2, 0.25), "by side, in any direction"),
}


def corrupt(image: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """The image with the corruption `name`; the same for the same arguments.

    A grey image stored in three equal channels stays grey.

    Args:
        image: uint8 (H, W, C), C 1 or 3.
        severity: 1 (weak) to 5 (strong).
        seed: of the noise, or of the direction.

    Raises:
        UsageError: there is no such corruption or severity.
    """
    check(name, severity)
    if image.shape[-1] == 3 and (image == image[..., :1]).all():
        return np.repeat(corrupt(image[..., :1], name, severity, seed), 3, axis=-1)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), severity])
    corruption = CORRUPTIONS[name]
    spoilt = corruption.apply(image.astype(np.float32) / 255, corruption.strengths[severity - 1], rng)
    return np.rint(np.clip(spoilt, 0, 1) * 255).astype(np.uint8)


def check(name: str, severity: int) -> None:
    """Raise UsageError unless there is such a corruption and severity."""
    if name not in CORRUPTIONS:
        raise UsageError(f"Unknown corruption {name!r}. Known: {', '.join(CORRUPTIONS)}.")
    if severity not in range(1, 6):
        raise UsageError(f"Severity of {name} is {severity}, but it goes from 1 to 5.")
