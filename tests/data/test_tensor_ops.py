"""Against Pillow, through timm's own functions."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from m2mkd_ray.data.tensor_ops import OPERATIONS, apply

ARGUMENTS = {
    "rotate": (-30, 30), "shear_x": (-0.3, 0.3), "shear_y": (-0.3, 0.3), "solarize_add": (0, 110),
    "translate_x_abs": (-20, 20), "translate_x_rel": (-0.45, 0.45), "translate_y_abs": (-20, 20),
    "translate_y_rel": (-0.45, 0.45), "solarize": (0, 257), "posterize": (1, 9), "desaturate": (0.4, 1.1),
}  # fmt: skip
"""Of each operation, from (inclusive) to (exclusive); 0.1 to 1.9 for the others that have one."""
WHOLE = ("solarize", "solarize_add", "posterize")
WITHOUT = ("auto_contrast", "equalize", "invert")
FILL = (124, 116, 104)
FILLED = torch.tensor(FILL, dtype=torch.uint8)


@pytest.fixture(scope="module")
def pictures():
    """Smooth ones, noise, one of a single colour, one of two values."""
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in range(6)]
    noise = [rng.integers(0, 256, (33, 33, 3), dtype=np.uint8) for _ in range(4)]
    flat, two = np.full((33, 33, 3), 77, np.uint8), 90 + rng.integers(0, 2, (33, 33, 3)).astype(np.uint8)
    return [*(one.resize((33, 33)) for one in small), *map(Image.fromarray, [*noise, flat, two])]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_operation_gives_pillows_pixels(name, interpolation, pictures):
    resample, rng = Image.Resampling[interpolation.upper()], np.random.default_rng(1)
    arguments = [rng.uniform(*ARGUMENTS.get(name, (0.1, 1.9))) for _ in pictures]
    arguments = [float(int(one)) if name in WHOLE else one for one in arguments]
    operation, expected = getattr(auto_augment, name), []
    for picture, argument in zip(pictures, arguments, strict=True):
        given = () if name in WITHOUT else (int(argument) if name in WHOLE else argument,)
        expected.append(np.asarray(operation(picture, *given, fillcolor=FILL, resample=resample)))
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2)
    found = apply(
        name,
        pixels,
        torch.tensor(arguments, dtype=torch.float64),
        fill=FILLED,
        interpolation=interpolation,
    )
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), np.stack(expected))


def test_no_bits_are_black(pictures):
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2)
    bits = torch.zeros(len(pixels), dtype=torch.float64)
    assert not apply("posterize", pixels, bits, fill=FILLED, interpolation="bicubic").any()
