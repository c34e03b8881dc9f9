"""What a report refuses to hold, and images in and out of it."""

import math

import numpy as np
import pytest

from m2mkd_ray.reporting import Curve, ExpertUse, RoutingExample, Span, encode_image
from m2mkd_ray.reporting.report import decode_image


def test_loads_that_are_no_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loads of 2 experts add up to 2.0000, expected 1"):
        ExpertUse(load=(1.0, 1.0), entropy=0.0)


def test_more_entropy_than_there_can_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is more than ln 2 = 0.6931"):
        ExpertUse(load=(0.5, 0.5), entropy=1.0)
    assert ExpertUse(load=(0.5, 0.5), entropy=math.log(2)).entropy == math.log(2)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Curve(name="x", title="x", kind="student", recipe="x", points=({"loss": math.nan},))


def test_a_ragged_grid_is_refused() -> None:
    image = encode_image(np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"not a rectangle.*\[1, 2\]"):
        RoutingExample(image=image, label="a", predicted="a", block="block 0", grid=((0,), (0, 1)))


def test_a_span_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher ends 1.000 s before it starts"):
        Span(stage="teacher", recipe="demo", worker="pid 1", node="a", start=2.0, end=1.0)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_images_come_back_as_they_were(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    back = np.round(255 * decode_image(encode_image(pixels))).astype(np.uint8)[..., :3]
    assert np.array_equal(back, np.broadcast_to(pixels.reshape(5, 7, -1), (5, 7, 3)))


def test_images_of_floats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float64 and shape \(4, 4\): expected uint8"):
        encode_image(np.zeros((4, 4)))
