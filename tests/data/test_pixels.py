import io

import numpy as np
import pytest
from PIL import Image

from m2mkd_ray.data.augment import Augmentation, eval_transform
from m2mkd_ray.data.importers.source import png
from m2mkd_ray.data.pixels import Pixels, decode
from m2mkd_ray.errors import DataError


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_png_is_lossless_for_grey_and_colour():
    for shape in [(5, 7), (5, 7, 1), (5, 7, 3)]:
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        assert np.array_equal(np.asarray(decode(png(pixels))), pixels.squeeze())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_grey_or_rgb(mode):
    image = Image.new(mode, (4, 4))
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    assert decode(file.getvalue()).mode in ("L", "RGB")


def test_what_is_transparent_becomes_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(decode(encoded(image))).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("content", [b"", b"no image", encoded(Image.new("RGB", (64, 64)))[:60]])
def test_what_cannot_be_decoded_is_named(content):
    with pytest.raises(DataError, match="Row 7 cannot be decoded"):
        decode(content, "Row 7")


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_kept_and_fresh_pixels_are_the_same(shape, make_dataset):
    rows = make_dataset(60, shape).rows("train")
    transform, used = eval_transform(8, Augmentation(kind="light")), np.arange(10, 50)
    kept = Pixels(rows, 8, transform, used, name="train")
    fresh = Pixels(rows, 8, transform, used, name="train", small=0)
    wanted = np.array([30, 11, 49, 30])
    assert kept(wanted).shape == (4, 8, 8, len(shape) * 2 - 3)
    assert fresh(wanted).shape == (4, 8, 8, 3)
    assert np.array_equal(np.broadcast_to(kept(wanted), (4, 8, 8, 3)), fresh(wanted))
    assert np.array_equal(kept(wanted)[0].squeeze(), np.asarray(decode(rows.read([30])[0])))
