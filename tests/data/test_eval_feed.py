import io
import pickle
import shutil

import numpy as np
import torch
from PIL import Image

from m2mkd_ray.data import Augmentation, EvalBatches, corrupt
from m2mkd_ray.data.augment import normalize


def evaluation(folder, **settings):
    defaults = {"img_size": 8, "batch_size": 16, "augmentation": Augmentation(kind="light")}
    return EvalBatches(folder, "train", **(defaults | settings))


def test_evaluation_has_all_rows_in_order_with_their_labels(make_dataset):
    folder = make_dataset(50)
    batches = evaluation(folder)
    loaded = list(batches)
    assert [len(labels) for _, labels in loaded] == [16, 16, 16, 2]
    assert batches.num_rows == 50
    assert torch.cat([labels for _, labels in loaded]).tolist() == [i % 3 for i in range(50)]
    pixels = [np.asarray(Image.open(io.BytesIO(image))) for image in folder.rows("train").read(range(50))]
    expected = normalize(np.stack(pixels)[..., None], Augmentation())
    assert torch.equal(torch.cat([images for images, _ in loaded]), expected)
    assert np.array_equal(batches.picture(7)[..., 2], pixels[7])


def test_evaluation_through_a_loader_is_the_same(make_dataset):
    batches = evaluation(make_dataset(50), corruption=("gaussian_noise", 3, 1))
    for (images, labels), (same, same_labels) in zip(batches, batches.loader(), strict=True):
        assert torch.equal(images, same)
        assert torch.equal(labels, same_labels)


def test_small_splits_are_evaluated_in_this_process_and_large_ones_by_workers(make_dataset):
    folder = make_dataset(100)
    assert evaluation(folder).loader(num_workers=2).num_workers == 0
    large = evaluation(folder, img_size=1100, batch_size=2, corruption=("contrast", 3, 1))
    assert large.loader(num_workers=2).num_workers == 2
    (images, labels), sent = large[7], pickle.dumps((large, large.read(7)))
    shutil.rmtree(folder.path)
    in_worker, read = pickle.loads(sent)
    assert torch.equal(in_worker.made(read)[0], images)
    assert torch.equal(in_worker.made(read)[1], labels)


def test_corrupted_evaluation_spoils_every_picture_by_a_seed_of_its_own(make_dataset):
    folder = make_dataset(20)
    clean, spoilt = evaluation(folder), evaluation(folder, corruption=("contrast", 2, 0))
    for number in range(20):
        assert np.array_equal(spoilt.picture(number), corrupt(clean.picture(number), "contrast", 2, 0))
    noisy = evaluation(folder, corruption=("gaussian_noise", 3, 0), batch_size=7)
    again = evaluation(folder, corruption=("gaussian_noise", 3, 0), batch_size=5)
    assert all(np.array_equal(noisy.picture(number), again.picture(number)) for number in range(20))
    noise = [noisy.picture(number).astype(int) - clean.picture(number) for number in range(2)]
    assert not np.array_equal(*noise)


def test_evaluation_of_a_few_rows_is_balanced(make_dataset):
    batches = evaluation(make_dataset(50), max_rows=9)
    assert np.bincount(batches.labels).tolist() == [3, 3, 3]
    assert sum(len(labels) for _, labels in batches) == 9
