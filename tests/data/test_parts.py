"""Parts of a split have the rows that Python's own slices say, and are read as the whole is."""

import numpy as np
import pytest

from m2mkd_ray.data import Batches, EvalBatches, FeedConfig
from m2mkd_ray.data.augment import Augmentation
from m2mkd_ray.data.parts import rows_of, whole
from m2mkd_ray.errors import DataError

SIZE = 8


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("train", range(100)), ("train[:]", range(100)), ("train[30:]", range(30, 100)), ("train[:30]", range(30)),
        ("train[-10:]", range(90, 100)), ("train[20:40]", range(20, 40)), ("train[:10%]", range(10)),
        ("train[10%:]", range(10, 100)), ("train[-25%:]", range(75, 100)), ("train[90:1000]", range(90, 100)),
    ],
)  # fmt: skip
def test_rows_are_those_of_pythons_slices(part: str, expected: range) -> None:
    assert rows_of(part, 100) == expected
    assert whole(part) == "train"


def test_complements_by_percentage_leave_no_row_out_and_have_none_twice() -> None:
    for rows in (7, 99, 1001):
        assert [*rows_of("train[:33%]", rows), *rows_of("train[33%:]", rows)] == list(range(rows))


def test_a_part_reads_as_the_same_rows_of_the_whole(make_dataset) -> None:
    """Row groups of 8: the part begins and ends within one."""
    folder = make_dataset(100)
    all_rows, part = folder.rows("train"), folder.rows("train[11:85]", cached_groups=1)
    assert len(part) == 74
    assert part.labels.tolist() == all_rows.labels[11:85].tolist()
    assert part.paths == all_rows.paths[11:85]
    wanted = np.random.default_rng(0).permutation(74)
    assert part.read(wanted) == all_rows.read(wanted + 11)
    assert [number for group in part.row_groups for number in group] == list(range(74))
    assert [len(group) for group in part.row_groups] == [5, *[8] * 8, 5]


def test_training_and_validation_on_parts_share_no_image_and_have_all(make_dataset) -> None:
    folder = make_dataset(96, shape=(SIZE, SIZE))
    config = FeedConfig(
        dataset="made", split="train[32:]", batch_size=8, lanes=2, img_size=SIZE,
        augmentation=Augmentation(kind="light", hflip=0),
    )  # fmt: skip
    batches = Batches(config, folder)
    assert (batches.num_rows, batches.steps_per_epoch) == (64, 8)
    trained = {image.numpy().tobytes() for step in range(8) for image in batches[step].images}
    held = EvalBatches(folder, "train[:32]", img_size=SIZE, batch_size=8, augmentation=config.augmentation)
    watched = {image.numpy().tobytes() for images, _ in held for image in images}
    everything = EvalBatches(folder, "train", img_size=SIZE, batch_size=8, augmentation=config.augmentation)
    assert not trained & watched
    assert trained | watched == {image.numpy().tobytes() for images, _ in everything for image in images}


def test_few_rows_of_a_part_are_drawn_from_it(make_dataset) -> None:
    folder = make_dataset(96, shape=(SIZE, SIZE))
    some = EvalBatches(folder, "train[48:]", img_size=SIZE, batch_size=8, augmentation=Augmentation(), max_rows=12)
    assert some.num_rows == 12
    assert np.bincount(some.labels).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("train[100:]", "no row in 'train\\[100:\\]': 'train' has 100 rows"),
        ("train[:0]", "no row in"),
        ("val[:50]", "no split 'val', only train"),
        ("train[50]", "'train\\[50\\]' is no split of made: a part of a split is written train\\[5000:\\]"),
        ("train[:a]", "is no split"),
        ("train[:50", "is no split"),
    ],
)
def test_what_is_no_part_is_told_with_how_one_is_written(part: str, told: str, make_dataset) -> None:
    with pytest.raises(DataError, match=told):
        make_dataset(100, name="made").rows(part)
