import numpy as np
import pytest

from m2mkd_ray.data import CORRUPTIONS, corrupt, find
from m2mkd_ray.data.pixels import decode
from m2mkd_ray.errors import UsageError


@pytest.fixture(scope="module")
def pictures():
    """Twenty real grey images, (28, 28, 1)."""
    images = find("fashion-mnist-small").rows("test").read(range(20))
    return [np.asarray(decode(image))[..., None] for image in images]


def distance(images, name, severity):
    spoilt = [corrupt(image, name, severity, seed) for seed, image in enumerate(images)]
    return np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(spoilt, images)])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_more_severe_is_further_from_the_original(name, pictures):
    distances = [distance(pictures, name, severity) for severity in range(1, 6)]
    assert distances[0] > 0
    assert distances == sorted(distances)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(28, 28, 1), (28, 28, 3), (64, 48, 3)])
def test_form_is_kept_and_the_same_seed_gives_the_same_image(name, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    original = image.copy()
    once, again = corrupt(image, name, 3, 5), corrupt(image, name, 3, 5)
    assert once.shape == shape
    assert once.dtype == np.uint8
    assert np.array_equal(once, again)
    assert np.array_equal(image, original)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "translate"])
def test_another_seed_gives_another_image(name, pictures):
    assert not np.array_equal(corrupt(pictures[0], name, 3, 1), corrupt(pictures[0], name, 3, 2))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_grey_image_is_the_same_in_one_channel_and_in_three(name, pictures):
    grey = corrupt(pictures[0], name, 3, 0)
    assert np.array_equal(corrupt(np.repeat(pictures[0], 3, axis=-1), name, 3, 0), np.repeat(grey, 3, axis=-1))


def test_the_strongest_inversion_is_the_negative(pictures):
    assert np.array_equal(corrupt(pictures[0], "invert", 5, 0), 255 - pictures[0])


def test_noise_has_the_deviation_of_the_paper():
    grey = np.full((200, 200, 1), 128, dtype=np.uint8)
    assert corrupt(grey, "gaussian_noise", 1, 0).std() / 255 == pytest.approx(0.08, rel=0.02)


def test_unknown_names_and_severities_list_the_known_ones(pictures):
    with pytest.raises(UsageError, match=r"Unknown corruption 'fog'\. Known: gaussian_noise, "):
        corrupt(pictures[0], "fog", 3, 0)
    with pytest.raises(UsageError, match="Severity of jpeg is 6, but it goes from 1 to 5"):
        corrupt(pictures[0], "jpeg", 6, 0)
