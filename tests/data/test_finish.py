"""Batches that a device finishes are those that timm and Pillow make, bit for bit on a CPU."""

import pickle

import pytest
import torch

from m2mkd_ray.data import IMAGENET, Augmentation, Batches, Drafts, FeedConfig, OnDevice, import_data
from m2mkd_ray.data.index import DatasetFolder

LIGHT = Augmentation(kind="light", shift=2, random_erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
EVERY_TIME = {"random_erasing": 0.9, "mix_prob": 0.7}
KINDS = {
    "light": LIGHT,
    "none": Augmentation(kind="none"),
    "papers": IMAGENET,
    "bilinear": IMAGENET.model_copy(update={"interpolation": "bilinear", **EVERY_TIME}),
    "recolor": IMAGENET.model_copy(update={"recolor": True, **EVERY_TIME}),
    "jitter": Augmentation(color_jitter=0.4, random_erasing=0.5),
    "original": Augmentation(auto_augment="original-mstd0.5", hflip=0),
    "strong": IMAGENET.model_copy(update={"auto_augment": "rand-m10-n4-p1-inc1"}),
}
CPU = torch.device("cpu")


def feed(augmentation, **settings):
    defaults = {"dataset": "small", "batch_size": 16, "lanes": 2, "shuffle_window": 2, "img_size": 20}
    return FeedConfig(augmentation=augmentation, **(defaults | settings))


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize(("kind", "shape"), [*((kind, (24, 31, 3)) for kind in KINDS), ("light", (20, 20))])
def test_a_device_makes_the_batches_that_pillow_makes(kind, shape, make_dataset):
    batches = Batches(feed(KINDS[kind]), make_dataset(64, shape))
    for step, batch in enumerate(OnDevice(Drafts(batches), CPU).loader(0, 4)):
        assert same(batch, batches[step])
        assert batch.images.is_contiguous()


def test_real_photographs_are_augmented_as_pillow_does(shared, tmp_path):
    import_data(
        "hub-parquet", shared / "tiny-imagenet" / "val.parquet", "photos", tmp_path, limit=64, rows_per_group=32
    )
    config = feed(IMAGENET, dataset="photos", split="val", batch_size=32, img_size=64)
    batches = Batches(config, DatasetFolder.open(tmp_path / "photos"))
    for step, batch in enumerate(OnDevice(Drafts(batches), CPU).loader(0, 4)):
        assert same(batch, batches[step])


def test_ranks_workers_and_views_change_nothing(make_dataset):
    folder, config = make_dataset(64, (24, 31, 3)), feed(IMAGENET, views=1)
    whole = Batches(config, folder)
    second = OnDevice(Drafts(Batches(config, folder, 1, 2)), CPU)
    (batch,) = second.loader(6, 7)  # step 2 again
    assert torch.equal(batch.images, whole[2].images[8:])
    assert torch.equal(batch.targets, whole[2].targets[8:])
    assert second.counts == {"decodes": 8}
    drafts = Drafts(whole)
    in_worker, read = pickle.loads(pickle.dumps((drafts, drafts.reader().read(1))))
    assert same(in_worker.made(read), drafts[1])


def test_the_global_generators_are_not_touched(make_dataset):
    loader = OnDevice(Drafts(Batches(feed(IMAGENET), make_dataset(64))), CPU).loader
    before = torch.get_rng_state()
    list(loader(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_makes_the_same_batches(kind, make_dataset):
    batches = Batches(feed(KINDS[kind]), make_dataset(64, (24, 31, 3)))
    for step, batch in enumerate(OnDevice(Drafts(batches), torch.device("cuda")).loader(0, 8, pin_memory=True)):
        assert batch.images.is_cuda
        assert same([tensor.cpu() for tensor in batch], batches[step])
