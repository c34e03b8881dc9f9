import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from m2mkd_ray.data import (
    Augmentation,
    Batches,
    BatchMaker,
    FeedConfig,
    OnDevice,
    SharedBatches,
    SharedDrafts,
    from_arrays,
    stream_key,
)
from m2mkd_ray.data.augment import IMAGENET
from m2mkd_ray.errors import DataError
from m2mkd_ray.execution.sharing import shared_stream, start_hub

LIGHT = Augmentation(kind="light", shift=2, random_erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def feed(**settings):
    defaults = {"dataset": "small", "batch_size": 8, "lanes": 4, "shuffle_window": 2, "img_size": 8}
    return FeedConfig(**(defaults | {"augmentation": LIGHT} | settings))


@dataclass(frozen=True)
class Handed:
    arrays: tuple[np.ndarray, ...]
    is_own: bool
    is_first: bool = False


def elsewhere(key: str, maker: BatchMaker, start: int, stop: int, workers: int) -> Iterator[Handed]:
    """As from another process: pickled there and back, read only. Every fourth step is the reader's own, and of the
    others it is the first to have the even ones."""
    make, make_here = pickle.loads(pickle.dumps(maker))(), maker()
    for step in range(start, stop):
        arrays = tuple(array.copy() for array in make(step))
        for array in arrays:
            array.flags.writeable = False
        yield Handed(make_here(step), True) if step % 4 == 3 else Handed(arrays, False, step % 2 == 0)


@pytest.mark.parametrize("augmentation", [LIGHT, IMAGENET], ids=["light", "timm"])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_batches_from_elsewhere_are_the_same_bit_for_bit(augmentation, rank, world, make_dataset):
    folder, config = make_dataset(100), feed(augmentation=augmentation, views=2)
    plain = Batches(config, folder, rank, world)
    shared = SharedBatches(config, folder, elsewhere, rank, world)
    assert shared.steps_per_epoch == plain.steps_per_epoch
    for step, batch in enumerate(shared.loader(5, 25), 5):
        assert all(map(torch.equal, batch, plain[step]))
    assert (shared.own, shared.handed) == (5, 15)


def test_drafts_from_elsewhere_are_finished_to_the_same_batches(make_dataset):
    folder, config = make_dataset(64, (24, 31, 3)), feed(augmentation=IMAGENET)
    drafts = SharedDrafts(config, folder, elsewhere)
    for step, batch in enumerate(OnDevice(drafts, torch.device("cpu")).loader(5, 9), 5):
        assert all(map(torch.equal, batch, Batches(config, folder)[step]))
    # its own step 7, and 6 and 8, which it was the first to have
    assert drafts.counts == {"decodes": 24, "own_batches": 1}
    assert stream_key(config, folder, is_draft=True) != stream_key(config, folder)


def test_a_stream_is_asked_for_as_many_workers_as_the_loader(make_dataset):
    asked = []

    def stream(key: str, maker: BatchMaker, start: int, stop: int, workers: int) -> Iterator[Handed]:
        asked.append(workers)
        return elsewhere(key, maker, start, stop, workers)

    shared = SharedBatches(feed(), make_dataset(100), stream)
    list(shared.loader(0, 1, num_workers=3))
    list(shared.loader(1, 2))
    assert asked == [3, 0]


def test_what_is_decoded_for_a_node_is_counted_by_who_has_it_first_and_by_nobody_else(make_dataset):
    shared = SharedBatches(feed(augmentation=IMAGENET), make_dataset(100), elsewhere)
    list(shared.loader(1, 2))
    assert shared.decodes == 0  # another reader had it before
    list(shared.loader(2, 3))
    assert shared.decodes == 8
    list(shared.loader(3, 4))
    assert shared.decodes == 16  # made here


def test_arrays_that_are_read_only_become_tensors_without_copy_or_warning(make_dataset):
    arrays = Batches(feed(), make_dataset(100)).arrays(0)
    for array in arrays:
        array.flags.writeable = False
    batch = from_arrays(arrays)  # a warning would be an error
    for array, tensor in zip(arrays, batch, strict=True):
        assert tensor.data_ptr() == array.__array_interface__["data"][0]
        assert np.array_equal(tensor.numpy(), array)
    assert not arrays[0].flags.writeable


def test_a_tensor_keeps_the_memory_of_its_array(make_dataset):
    expected = Batches(feed(), make_dataset(100))[2]

    def made():
        arrays = tuple(array.copy() for array in Batches(feed(), folder).arrays(2))
        for array in arrays:
            array.flags.writeable = False
        return from_arrays(arrays)

    folder = make_dataset(100)
    some = [made() for _ in range(20)]
    assert all(torch.equal(batch.images, expected.images) for batch in some)


def test_a_stream_has_another_key_for_all_that_decides_its_batches(make_dataset):
    folder, other = make_dataset(100), make_dataset(96, name="other")
    keys = [
        stream_key(feed(), folder),
        stream_key(feed(seed=1), folder),
        stream_key(feed(views=2), folder),
        stream_key(feed(), other),
        stream_key(feed(), folder, 0, 2),
        stream_key(feed(), folder, 1, 2),
    ]
    assert len(set(keys)) == len(keys)
    assert stream_key(feed(), folder) == keys[0]


def test_a_maker_pickles_small_whatever_it_has_here(make_dataset):
    folder = make_dataset(100)
    maker = BatchMaker(feed(), folder.path, here=Batches(feed(), folder))
    maker()(0)
    assert len(pickle.dumps(maker)) < 2000
    assert pickle.loads(pickle.dumps(maker)).here is None


def test_a_maker_says_if_there_are_no_data(tmp_path):
    with pytest.raises(DataError, match="holds no data set"):
        BatchMaker(feed(), tmp_path)()


@pytest.mark.ray
def test_batches_from_a_nodes_feed_are_the_same_bit_for_bit(make_dataset, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    folder, config = make_dataset(100), feed(augmentation=IMAGENET, views=2)
    plain = Batches(config, folder)
    with tempfile.TemporaryDirectory(prefix="m2-", ignore_cleanup_errors=True) as short:
        ray.init(address="local", num_cpus=1, _temp_dir=short, include_dashboard=False, log_to_driver=False)
        try:
            hub, node = start_hub(), ray.get_runtime_context().get_node_id()
            shared = [
                SharedBatches(config, folder, lambda *asked: shared_stream(hub, node, *asked[:4], "a test", asked[4]))
                for _ in range(2)
            ]
            for step, pair in enumerate(zip(*(one.loader(3, 30) for one in shared), strict=True), 3):
                assert all(map(torch.equal, pair[0], plain[step]))
                assert all(map(torch.equal, pair[1], plain[step]))
            assert [(one.own, one.handed) for one in shared] == [(0, 27)] * 2
            assert sum(one.decodes for one in shared) == 27 * 8, "each image of a step once, by who had it first"
            assert hub.counts().made == 27
        finally:
            ray.shutdown()
