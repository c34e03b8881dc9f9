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


GREYS = [0.0, 0.25, 0.5, 1.0]
"""Shares of white."""


def of_greys(mode, white):
    return Image.fromarray((np.array([GREYS]) * white).astype({"I;16": "<u2", "I": "<i4", "F": "<f4"}[mode]))


@pytest.mark.parametrize(
    ("image", "form"),
    [
        (of_greys("I;16", 65535), "PNG"),
        (of_greys("I;16", 65535), "TIFF"),
        (of_greys("I", 65535), "TIFF"),
        (of_greys("F", 1), "TIFF"),
    ],
    ids=["I;16-png", "I;16-tiff", "I", "F"],
)
def test_more_than_8_bits_become_8(image, form):
    file = io.BytesIO()
    image.save(file, form)
    decoded = decode(file.getvalue())
    assert decoded.mode == "L"
    assert np.asarray(decoded).ravel().tolist() == pytest.approx([255 * grey for grey in GREYS], abs=1)


@pytest.mark.parametrize("values", [[0.0, 200.0], [-1.0, 1.0], [float("nan"), 0.0]])
def test_numbers_without_a_known_white_are_refused(values):
    file = io.BytesIO()
    Image.fromarray(np.array([values], np.float32)).save(file, "TIFF")
    with pytest.raises(DataError, match=r"Row 7 cannot be decoded .*mode F with values from"):
        decode(file.getvalue(), "Row 7")


def transparent(image, transparency):
    file = io.BytesIO()
    image.save(file, "PNG", transparency=transparency)
    return file.getvalue()


def in_palette(places, *colours):
    image = Image.fromarray(np.array(places, np.uint8)).convert("P")
    image.putpalette([value for colour in colours for value in colour])
    return image


@pytest.mark.parametrize(
    "content",
    [
        transparent(Image.fromarray(np.array([[0, 60]], np.uint8)), 0),
        transparent(Image.fromarray(np.array([[0, 60 * 257]], np.uint16)), 0),
        transparent(Image.fromarray(np.array([[[0, 0, 0], [60, 60, 60]]], np.uint8)), (0, 0, 0)),
        transparent(in_palette([[0, 1]], (9, 0, 0), (60, 60, 60)), b"\x00\xff"),
        encoded(Image.fromarray(np.array([[[0, 0], [60, 255]]], np.uint8), "LA")),
    ],
    ids=["L", "I;16", "RGB", "P", "LA"],
)
def test_every_kind_of_transparency_becomes_white(content):
    pixels = np.asarray(decode(content).convert("RGB"))[0].tolist()
    assert sorted(pixels) == [[60, 60, 60], [255, 255, 255]]


def test_inks_become_light():
    file = io.BytesIO()
    Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(file, "TIFF")
    assert np.asarray(decode(file.getvalue())).tolist() == [[[255, 0, 0]]]


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


def test_rows_on_demand_are_decoded_when_they_are_asked_for_and_once(make_dataset):
    rows = make_dataset(60, (8, 8)).rows("train")
    transform, used = eval_transform(8, Augmentation(kind="light")), np.arange(10, 50)
    ahead, lazy = (Pixels(rows, 8, transform, used, name="train", on_demand=on_demand) for on_demand in (False, True))
    wanted = np.array([30, 11, 49, 30])
    assert np.array_equal(lazy(wanted), ahead(wanted))
    assert (lazy.decodes, ahead.decodes) == (3, 40)
    assert np.array_equal(lazy(np.array([12, 11])), ahead(np.array([12, 11])))
    assert (lazy.decodes, ahead.decodes) == (4, 40)
