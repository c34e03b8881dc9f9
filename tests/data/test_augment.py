import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.mixup import Mixup, mixup_target

from m2mkd_ray.data.augment import (
    IMAGENET,
    Augmentation,
    eval_transform,
    light,
    mix,
    normalize,
    operations_of,
    recolored,
    seeded,
    train_transform,
)

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((240, 180))


def test_the_global_generators_are_left_as_they_were():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="low"), seeded(7, 8):  # put back even if something fails in between
        random.random(), np.random.randint(random.randint(5, 9), torch.randint(0, 3, ()).item())
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_the_papers_training_transform_is_timms(photo):
    ours = train_transform(IMAGENET, 64)
    timms = create_transform(
        64,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )
    for seed in range(5):
        with seeded(seed):
            expected = timms(photo)
        with seeded(seed):
            assert torch.equal(ours(photo), expected)


def test_the_evaluation_transform_is_timms(photo):
    timms = create_transform(64, is_training=False, interpolation="bicubic", crop_pct=224 / 256)
    pixels = eval_transform(64, IMAGENET)(photo).permute(1, 2, 0).numpy()
    torch.testing.assert_close(normalize(pixels[None], IMAGENET)[0], timms(photo), rtol=0, atol=1e-6)


def test_small_images_are_not_resized_for_evaluation_unless_asked():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8))
    kept = eval_transform(28, Augmentation(kind="light"))(picture)
    assert np.array_equal(kept[0].numpy(), np.asarray(picture))
    assert not torch.equal(eval_transform(28, Augmentation(kind="light", crop_pct=0.875))(picture), kept)


def test_grey_images_get_three_channels():
    grey = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    assert torch.equal(normalize(grey, IMAGENET), normalize(np.repeat(grey, 3, axis=-1), IMAGENET))


def test_light_is_a_flip_and_a_shift_of_each_image():
    aug = Augmentation(kind="light", shift=2, hflip=0.5, fill=9, **PLAIN)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 6, 6, 1), dtype=np.uint8)
    with seeded(0) as rng:
        images = light(pixels, aug, rng)
    seen = set()
    for image, original in zip(images, pixels[..., 0]):
        found = [
            (flip, dy, dx)
            for flip in (False, True)
            for dy in range(5)
            for dx in range(5)
            if np.array_equal(
                np.rint(image[0].numpy() * 255),
                np.flip(np.pad(original, 2, constant_values=9)[dy : dy + 6, dx : dx + 6], 1)
                if flip
                else np.pad(original, 2, constant_values=9)[dy : dy + 6, dx : dx + 6],
            )
        ]
        assert found
        seen.update(found)
    assert {flip for flip, _, _ in seen} == {False, True}
    assert {dy for _, dy, _ in seen} == {dx for _, _, dx in seen} == set(range(5))


def test_none_only_normalises():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    with seeded(0) as rng:
        images = light(pixels, Augmentation(kind="none"), rng)
    assert torch.equal(images, normalize(pixels, Augmentation()))


def test_erasing_fills_about_as_many_images_as_asked_with_noise():
    pixels = np.zeros((400, 16, 16, 1), dtype=np.uint8)
    with seeded(0) as rng:
        images = light(pixels, Augmentation(kind="none", random_erasing=0.25, **PLAIN), rng)
    erased = images.flatten(1).ne(0).any(1)
    assert 70 < erased.sum() < 130


def test_recoloring_draws_ink_and_paper_and_leaves_colour_images_alone():
    pixels = np.zeros((50, 4, 4, 3), dtype=np.uint8)
    pixels[:, 2:] = 255  # the upper half is ink, the lower half paper
    pixels[0, 0, 0] = (10, 20, 30)
    result = recolored(pixels, np.random.default_rng(0))
    assert np.array_equal(result[0], pixels[0])
    ink, paper = result[1:, 0, 0].astype(int), result[1:, 3, 3].astype(int)
    assert all((result[1:, :2] == ink[:, None, None]).ravel())
    assert (((ink < 128) & (paper >= 128)) | ((ink >= 128) & (paper < 128))).all()
    assert len(np.unique(ink, axis=0)) == 49
    assert 10 < (ink[:, 0] < 128).sum() < 40


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_targets_are_smoothed_as_timm_does(smoothing):
    labels = torch.tensor([2, 0, 1])
    images = torch.rand(3, 3, 4, 4)
    same, targets, lam = mix(images.clone(), labels, Augmentation(label_smoothing=smoothing), 5)
    assert lam == 1
    assert torch.equal(same, images)
    assert torch.equal(targets, mixup_target(labels, 5, smoothing=smoothing))
    torch.testing.assert_close(targets.sum(1), torch.ones(3))


def test_mixing_is_timms():
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 5
    timms = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    for seed in range(5):
        with seeded(seed):
            expected = timms(images.clone(), labels)
        with seeded(seed):
            mixed = mix(images.clone(), labels, IMAGENET, 5)
        assert torch.equal(mixed[0], expected[0])
        assert torch.equal(mixed[1], expected[1])
        assert torch.equal(mixed[1], mixup_target(labels, 5, lam=mixed.lam, smoothing=0.1))
        torch.testing.assert_close(mixed[1].sum(1), torch.ones(8))


def test_a_setting_without_effect_is_refused():
    with pytest.raises(ValueError, match="kind is timm, but shift needs kind light"):
        Augmentation(kind="timm", shift=2)
    with pytest.raises(ValueError, match="kind is light, but auto_augment needs kind timm"):
        Augmentation(kind="light", auto_augment="rand-m9")


@pytest.mark.parametrize(
    ("policy", "found"),
    [
        ("v1", "Unknown AA policy v1"),
        ("random-m9", "it knows no 'random'"),
        ("rand-m9-x3", "Unknown RandAugment config section"),
        ("rand-m9.5", r"invalid literal for int\(\) with base 10: '9.5'"),
        ("augmix-m3-n2", "Unknown AugMix config section"),
        ("original-m9", "Unknown AutoAugment config section"),
        # These are built by timm, as if what it does not know were not there.
        ("rand-m9-mstd-inc1", "'mstd' says nothing to it"),
        ("rand-m9-inc-tweight", "'inc', 'tweight' says nothing to it"),
        ("", "'' says nothing to it"),
    ],
)
def test_a_policy_that_timm_does_not_read_whole_is_refused_with_how_one_is_spelt(policy: str, found: str) -> None:
    with pytest.raises(
        ValueError, match=rf"(?s)auto_augment\n.*{policy!r} is no policy .* read: {found}\. It is rand"
    ):
        Augmentation(kind="timm", auto_augment=policy)


@pytest.mark.parametrize(
    "policy",
    ["rand-m9-n3-p0.7-mstd0.5-mmax12-inc1-t3aw", "rand-mstd101-tweights", "augmix-m5-w4-d2-a0.5-b1", "3a", "v0r"],
)
def test_whatever_timm_reads_whole_is_a_policy(policy: str) -> None:
    assert Augmentation(kind="timm", auto_augment=policy).auto_augment == policy


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m9-mstd0.5-inc1", "originalr", "augmix-m5"])
def test_an_operation_of_no_bits_makes_an_image_black(policy: str) -> None:
    """timm asks Pillow for 0 bits at magnitude 10, which Pillow refuses; the mask of no bits leaves nothing."""
    transform = train_transform(Augmentation(kind="timm", auto_augment=policy), 32)
    ops = [op for op in operations_of(transform) if op.name.startswith("Posterize")]
    assert ops or policy == "augmix-m5"
    image = Image.fromarray(np.random.default_rng(0).integers(1, 255, (32, 32, 3), dtype=np.uint8))
    for op in ops:
        assert not np.asarray(op.aug_fn(image, 0)).any()
        assert np.array_equal(op.aug_fn(image, 3), ImageOps.posterize(image, 3))
        op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
        assert op(image).size == (32, 32)
