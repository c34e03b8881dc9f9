import numpy as np
import pytest
import torch

from m2mkd_ray.data import IMAGENET, Augmentation, Batches, Drafts, FeedConfig, undrawable
from m2mkd_ray.errors import UsageError

BLURRED = IMAGENET.model_copy(update={"auto_augment": "rand-m9-t3a"})


def test_what_only_pillow_can_do_is_named(make_dataset):
    assert undrawable(IMAGENET) is None
    assert undrawable(Augmentation(kind="light")) is None
    assert "has AugMixAugment, which only Pillow can do" in str(
        undrawable(Augmentation(auto_augment="augmix-m5-w4-d2"))
    )
    with pytest.raises(UsageError, match=r"'rand-m9-t3a' has GaussianBlur, which only Pillow"):
        Drafts(Batches(FeedConfig(dataset="x", batch_size=8, img_size=8, augmentation=BLURRED), make_dataset(16)))


def test_a_draft_is_a_quarter_of_its_batch_where_nothing_is_erased(make_dataset):
    config = FeedConfig(dataset="x", batch_size=8, img_size=32, augmentation=Augmentation(auto_augment="rand-m9"))
    batches = Batches(config, make_dataset(16, (32, 32, 3)))
    sizes = [sum(array.nbytes for array in of.arrays(0)) for of in (Drafts(batches), batches)]
    assert sizes[0] < 0.27 * sizes[1]
    draft = Drafts(batches)[1]
    assert draft.pixels.dtype == torch.uint8
    assert draft.operations.shape == draft.arguments.shape == (8, 2)
    assert np.array_equal(draft.rows, batches[1].rows)
