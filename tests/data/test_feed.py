import pickle
import random
import shutil

import numpy as np
import pytest
import torch

from m2mkd_ray.data import (
    Augmentation,
    Batches,
    ClassName,
    DatasetFolder,
    FeedConfig,
    Index,
    Row,
    ShardWriter,
    Split,
    find,
)
from m2mkd_ray.data.augment import IMAGENET
from m2mkd_ray.data.loader import Ahead
from m2mkd_ray.errors import DataError, UsageError

LIGHT = Augmentation(kind="light", shift=2, random_erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
RECOLOR = {"recolor": True}
KINDS = {
    "light": LIGHT,
    "timm": IMAGENET,
    "light-recolor": LIGHT.model_copy(update=RECOLOR),
    "timm-recolor": IMAGENET.model_copy(update=RECOLOR),
}


def feed(augmentation=LIGHT, **settings):
    defaults = {"dataset": "small", "batch_size": 8, "lanes": 4, "shuffle_window": 2, "img_size": 8}
    return FeedConfig(augmentation=augmentation, **(defaults | settings))


def equal(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_seed_and_step(kind, make_dataset):
    folder = make_dataset(100)
    batches = Batches(feed(KINDS[kind]), folder)
    in_order = [batches[step] for step in range(40)]  # more than three epochs
    for step in (39, 0, 17):
        assert equal(Batches(feed(KINDS[kind]), folder)[step], in_order[step])
    assert not equal(in_order[0], in_order[1])
    assert not equal(Batches(feed(KINDS[kind], seed=1), folder)[0], in_order[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_have_the_batch_of_one(kind, world, make_dataset):
    folder = make_dataset(100)
    alone = Batches(feed(KINDS[kind]), folder)
    ranks = [Batches(feed(KINDS[kind]), folder, rank, world) for rank in range(world)]
    for step in (0, 5, 20):
        lanes = alone[step].images.unflatten(0, (4, 2))  # (lane, row, 3, H, W)
        targets = alone[step].targets.unflatten(0, (4, 2))
        for rank, batches in enumerate(ranks):
            assert torch.equal(batches[step].images, lanes[rank::world].flatten(0, 1))
            assert torch.equal(batches[step].targets, targets[rank::world].flatten(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_generators_are_not_touched(kind, make_dataset):
    batches = Batches(feed(KINDS[kind]), make_dataset(100))
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    list(batches.loader(0, 3))
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_batches_have_the_form_that_models_expect(make_dataset):
    batch = Batches(feed(), make_dataset(100))[3]
    assert batch.images.shape == (8, 3, 8, 8)
    assert batch.images.dtype == batch.targets.dtype == torch.float32
    assert batch.images.is_contiguous()
    torch.testing.assert_close(batch.targets.sum(1), torch.ones(8))


def test_without_augmentation_every_row_comes_once_an_epoch_with_its_label(make_dataset):
    plain = Augmentation(kind="none", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    batches = Batches(feed(plain, lanes=1, batch_size=10), make_dataset(100))
    assert (batches.num_rows, batches.steps_per_epoch) == (100, 10)
    seen = [batches[step] for step in range(10)]
    numbers = torch.cat([b.images[:, 0, 0, 1] for b in seen]).mul(255).round().long()  # the row number is in pixel 1
    assert sorted(numbers.tolist()) == list(range(100))
    assert torch.equal(torch.cat([b.targets for b in seen]).argmax(1), numbers % 3)


def test_a_subset_is_balanced_and_the_same_for_every_seed(make_dataset):
    folder = make_dataset(100)
    plain = Augmentation(kind="none", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def numbers(seed):
        batches = Batches(feed(plain, lanes=1, batch_size=6, max_rows=30, seed=seed), folder)
        assert (batches.num_rows, batches.steps_per_epoch) == (30, 5)
        images = torch.cat([batches[step].images for step in range(5)])
        return sorted(images[:, 0, 0, 1].mul(255).round().int().tolist())

    assert numbers(0) == numbers(1)
    assert len(set(numbers(0))) == 30
    assert np.bincount(np.array(numbers(0)) % 3).tolist() == [10, 10, 10]


def test_a_batch_larger_than_the_split_is_an_epoch_of_one_step(make_dataset):
    batches = Batches(feed(batch_size=64), make_dataset(40))
    assert batches.steps_per_epoch == 1
    assert len(batches[1].images) == 64


def test_a_loader_gives_the_steps_in_order(make_dataset):
    batches = Batches(feed(), make_dataset(100))
    loaded = list(batches.loader(5, 9))
    assert len(loaded) == 4
    assert all(equal(batch, batches[step]) for step, batch in enumerate(loaded, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2])
def test_cycled_views_repeat_the_first_epochs(kind, world, make_dataset):
    folder = make_dataset(100)
    endless = Batches(feed(KINDS[kind]), folder, world - 1, world)
    batches = Batches(feed(KINDS[kind], views=2), folder, world - 1, world)
    cycle = 2 * batches.steps_per_epoch
    for step in (0, 3, cycle - 1):
        assert all(map(torch.equal, batches[step], endless[step]))
        assert all(map(torch.equal, batches[step], batches[step + 3 * cycle]))
        assert batches.cycled(step + cycle) == step
    assert not equal(batches[3], batches[3 + batches.steps_per_epoch])
    loaded = list(batches.loader(cycle - 1, cycle + 1))
    assert equal(loaded[1], batches[0])


def test_settings_that_are_as_ever_leave_the_config_as_it_was():
    assert "views" not in feed().model_dump(mode="json")
    assert feed(views=3).model_dump(mode="json")["views"] == 3
    assert FeedConfig.model_validate(feed(views=3).model_dump()) == feed(views=3)
    with pytest.raises(ValueError, match="greater than 0"):
        feed(views=0)


@pytest.mark.parametrize(
    "mixing", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {"mix_prob": 0.0}, {"mix_prob": 0.5}]
)
def test_a_batch_says_which_rows_it_was_mixed_from(mixing, make_dataset):
    """Made again from the rows, their partners and lambda: the targets, and the images of mixup."""
    folder = make_dataset(100)
    plain = Augmentation(kind="none", mean=(0.0,) * 3, std=(1.0,) * 3, label_smoothing=0.1)
    alone = Batches(feed(plain), folder)
    batches = Batches(feed(plain.model_copy(update={"mixup": 0.8, "cutmix": 1.0} | mixing)), folder)
    labels, lams = torch.arange(100) % 3, set()
    for step in range(10):
        batch, unmixed = batches[step], alone[step]
        assert torch.equal(batch.rows, unmixed.rows)
        assert torch.equal(unmixed.partners, unmixed.rows)
        assert torch.equal(unmixed.lam, torch.ones(8))
        lams |= set(batch.lam.tolist())
        own, other = (torch.nn.functional.one_hot(labels[some], 3) for some in (batch.rows, batch.partners))
        lam = batch.lam[:, None]
        expected = 0.9 * (lam * own + (1 - lam) * other) + 0.1 / 3
        torch.testing.assert_close(batch.targets, expected)
        is_mixed = batch.lam < 1
        assert torch.equal(batch.partners == batch.rows, ~is_mixed)
        if not batches.config.augmentation.cutmix:
            image_of = dict(zip(unmixed.rows.tolist(), unmixed.images))
            partners = torch.stack([image_of[row] for row in batch.partners.tolist()])
            share = batch.lam.view(-1, 1, 1, 1)
            torch.testing.assert_close(batch.images, share * unmixed.images + (1 - share) * partners)
    assert (lams == {1.0}) == (mixing == {"mix_prob": 0.0})


def test_decodes_are_counted(make_dataset):
    folder = make_dataset(100)
    batches = Batches(feed(IMAGENET), folder)
    list(batches.loader(0, 3))
    assert batches.decodes == 24
    kept = Batches(feed(), folder)  # a small split is decoded once
    list(kept.loader(0, 30))
    assert kept.decodes == 100
    assert pickle.loads(pickle.dumps(kept)).decodes == 0


LARGE = {"img_size": 1100, "batch_size": 2, "lanes": 1}
"""A hundred images of that size are no small split."""


@pytest.mark.parametrize(
    "settings", [{"augmentation": IMAGENET}, {}, {"augmentation": Augmentation(kind="none"), **LARGE}]
)
def test_a_worker_gets_what_its_step_is_made_from_and_reads_nothing(settings, make_dataset):
    folder = make_dataset(100)
    batches = Batches(feed(**settings), folder)
    expected, sent = batches[5], pickle.dumps((batches, batches.read(5)))
    assert len(sent) < 100_000
    shutil.rmtree(folder.path)
    in_worker, read = pickle.loads(sent)
    assert equal(in_worker.made(read), expected)


def test_what_is_read_ahead_of_workers_is_what_the_steps_are_made_from(make_dataset):
    batches = Batches(feed(IMAGENET), make_dataset(100))
    ahead = Ahead(batches, range(3, 9))
    assert len(ahead) == 6
    for step, read in enumerate(ahead, 3):
        assert equal(batches.made(read), batches[step])


def test_images_that_cannot_be_read_ahead_end_the_reading(make_dataset):
    folder = make_dataset(100)
    batches = Batches(feed(IMAGENET), folder)
    shutil.rmtree(folder.path)
    with pytest.raises(DataError, match="cannot be read"):
        list(Ahead(batches, range(3)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["light", "timm"])
def test_worker_processes_change_nothing(kind, make_dataset):
    batches = Batches(feed(KINDS[kind]), make_dataset(100))
    loaded = list(batches.loader(3, 11, num_workers=2))
    assert all(equal(batch, batches[step]) for step, batch in enumerate(loaded, 3))
    assert len(loaded) == 8


def test_settings_that_do_not_divide_are_refused(make_dataset):
    with pytest.raises(ValueError, match="batch_size 10 is not a multiple of lanes 4"):
        feed(batch_size=10)
    with pytest.raises(ValueError, match="batch_size 12 in 4 lanes gives 3 images each, an odd number"):
        feed(batch_size=12)
    with pytest.raises(UsageError, match=r"4 lanes cannot be shared evenly by 3 ranks"):
        Batches(feed(), make_dataset(100), rank=0, world=3)
    with pytest.raises(DataError, match="64 lanes need at least 64 row groups, but the split has 13"):
        Batches(feed(lanes=64, batch_size=128), make_dataset(100))


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    writer = ShardWriter(tmp_path, "train", rows_per_group=4)
    for number in range(16):
        writer.add(Row(image=b"no image", path=f"{number}.png", label=number % 2))
    writer.close()
    index = Index(
        name="broken",
        licence="MIT",
        source="a test",
        classes=(ClassName(id="a", name="a"), ClassName(id="b", name="b")),
        splits={"train": Split(rows=16, rows_per_class=(8, 8), shards=tuple(writer.shards))},
    )
    for kind in ("light", "timm"):
        with pytest.raises(DataError, match=r"Row \d+ of split train cannot be decoded"):
            Batches(feed(KINDS[kind]), DatasetFolder(tmp_path, index))[0]


def test_the_shipped_images_are_fed_at_their_own_size():
    batches = Batches(
        FeedConfig(dataset="x", batch_size=32, img_size=28, augmentation=LIGHT), find("fashion-mnist-small")
    )
    assert batches.steps_per_epoch == 250
    assert batches[0].images.shape == (32, 3, 28, 28)
    assert batches[0].targets.shape == (32, 10)
