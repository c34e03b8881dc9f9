from collections import Counter

import numpy as np
import pytest

from m2mkd_ray.data.lanes import Lanes, balanced
from m2mkd_ray.errors import DataError


def groups(num_groups, size, last=None):
    ends = [*range(size, num_groups * size, size), (num_groups - 1) * size + (last or size)]
    return np.split(np.arange(ends[-1]), ends[:-1])


@pytest.mark.parametrize("window", [1, 3, 16])
@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_every_row_comes_exactly_once_in_each_epoch_of_its_lane(lanes, window):
    nearly_even = groups(20, 7, last=5)
    some = Lanes(nearly_even, lanes, window, seed=3)
    for lane in range(lanes):
        rows, epochs = some.take(lane, 0, 3 * some.sizes[lane])
        mine = [row for group in nearly_even[lane::lanes] for row in group]
        for epoch in range(3):
            assert sorted(rows[epochs == epoch]) == mine


def test_lanes_share_all_rows_and_no_row_is_in_two():
    some = Lanes(groups(11, 7), 3, 2, seed=0)
    rows = [row for lane in range(3) for row in some.take(lane, 0, some.sizes[lane])[0]]
    assert Counter(rows) == Counter(range(77))


@pytest.mark.parametrize(
    ("sizes", "lanes"), [((2, 256, 44), 2), ((3, 5, None), 2), ((11, 7, 3), 5), ((9, 4, None), 8)]
)
def test_all_rows_are_seen_as_often_even_if_the_row_groups_cannot_be_dealt_evenly(sizes, lanes):
    num_rows = sum(map(len, groups(*sizes)))
    some = Lanes(groups(*sizes), lanes, 2, seed=0)
    assert max(some.sizes) - min(some.sizes) <= 1
    rows = [row for lane in range(lanes) for row in some.take(lane, 0, some.sizes[lane])[0]]
    assert sorted(rows) == list(range(num_rows))


def test_no_more_row_groups_are_cut_than_there_are_seams_between_lanes():
    some = Lanes(groups(11, 7), 4, 11, seed=0)
    owners = [{row // 7 for row in some.take(lane, 0, some.sizes[lane])[0]} for lane in range(4)]
    assert sum(map(len, owners)) <= 11 + 3


def test_the_shipped_images_are_dealt_whole_as_they_are_only_nearly_even():
    assert Lanes(groups(32, 256, last=64), 2, 16, seed=0).sizes == [4096, 3904]


def test_a_piece_of_the_stream_does_not_depend_on_where_reading_begins():
    whole = Lanes(groups(6, 5), 2, 2, seed=0).take(1, 0, 100)[0]
    pieces = [Lanes(groups(6, 5), 2, 2, seed=0).take(1, start, 10)[0] for start in range(0, 100, 10)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_epochs_and_seeds_differ():
    rows = Lanes(groups(6, 5), 1, 6, seed=0).take(0, 0, 60)[0]
    assert not np.array_equal(rows[:30], rows[30:])
    assert not np.array_equal(rows, Lanes(groups(6, 5), 1, 6, seed=1).take(0, 0, 60)[0])


def test_rows_in_a_row_come_from_no_more_row_groups_than_the_window_holds():
    rows = Lanes(groups(12, 50), 1, 3, seed=0).take(0, 0, 600)[0]
    for start in range(0, 600, 150):
        assert len(set(rows[start : start + 150] // 50)) == 3


def test_too_few_row_groups_are_refused():
    with pytest.raises(DataError, match="4 lanes need at least 4 row groups, but the split has 3"):
        Lanes(groups(3, 5), 4, 1, seed=0)


def test_a_subset_has_as_many_rows_of_each_class():
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    subset = balanced(labels, 200, seed=0)
    assert np.bincount(labels[subset]).tolist() == [20] * 10
    assert np.array_equal(subset, np.unique(subset))
    assert np.array_equal(subset, balanced(labels, 200, seed=0))
    assert not np.array_equal(subset, balanced(labels, 200, seed=1))


def test_a_rare_class_gives_all_it_has():
    labels = np.array([0] * 50 + [1] * 3)
    assert np.bincount(labels[balanced(labels, 20, seed=0)]).tolist() == [17, 3]
    assert len(balanced(labels, 99, seed=0)) == 53
