import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest

from m2mkd_ray.data.shards import Row, ShardWriter, sha256
from m2mkd_ray.errors import DataError


def rows(start, stop):
    return [Row(image=f"image {i}".encode() * (i % 5 + 1), path=f"{i}.png", label=i % 3) for i in range(start, stop)]


def write_all(folder, some_rows, **settings):
    writer = ShardWriter(folder, "train", rows_per_group=4, groups_per_shard=2, **settings)
    for row in some_rows:
        writer.add(row)
    writer.close()
    return writer.shards


def test_any_parquet_reader_finds_images_paths_and_labels(tmp_path):
    shards = write_all(tmp_path, rows(0, 19))
    table = [row for shard in shards for row in pq.read_table(tmp_path / shard.file).to_pylist()]
    assert table == [{"image": {"bytes": r.image, "path": r.path}, "label": r.label} for r in rows(0, 19)]


def test_shards_and_row_groups_have_the_sizes_asked_for(tmp_path):
    shards = write_all(tmp_path, rows(0, 19))
    assert [shard.row_groups for shard in shards] == [(4, 4), (4, 4), (3,)]
    assert [shard.file for shard in shards] == [f"train-0000{i}.parquet" for i in range(3)]
    assert all(shard.bytes == (tmp_path / shard.file).stat().st_size for shard in shards)
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard.file for shard in shards]


def test_a_writer_that_goes_on_ends_with_the_same_bytes(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = write_all(tmp_path / "one", rows(0, 19))
    killed = ShardWriter(tmp_path / "two", "train", rows_per_group=4, groups_per_shard=2)
    became_whole = [killed.add(row) for row in rows(0, 13)]
    assert became_whole.index(True) == 7
    assert sum(became_whole) == 1
    killed.abort()
    assert write_all(tmp_path / "two", rows(8, 19), shards=killed.shards) == whole
    assert [sha256(tmp_path / "two" / s.file) for s in whole] == [s.sha256 for s in whole]


def test_rows_are_read_in_the_order_asked_for(make_dataset):
    folder = make_dataset(100)
    in_order = folder.rows("train").read(range(100))
    wanted = np.random.default_rng(0).permutation(100)[:37]
    assert folder.rows("train", cached_groups=1).read(wanted) == [in_order[i] for i in wanted]


def test_labels_paths_and_row_groups_cover_all_rows(make_dataset):
    rows = make_dataset(100).rows("train")
    assert rows.labels.tolist() == [i % 3 for i in range(100)]
    assert rows.paths == [f"{i}.png" for i in range(100)]
    assert [number for group in rows.row_groups for number in group] == list(range(100))
    assert {len(group) for group in rows.row_groups} == {8, 4}


def test_no_more_row_groups_are_held_than_allowed(make_dataset):
    rows = make_dataset(100).rows("train", cached_groups=3)
    rows.read(range(100))
    assert len(rows._cache) == 3


def test_rows_pickle_without_the_images_that_were_read(make_dataset):
    rows = make_dataset(100, shape=(64, 64)).rows("train", cached_groups=99)
    images = rows.read(range(100))
    pickled = pickle.dumps(rows)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled).read(range(100)) == images


def test_a_truncated_shard_is_named_with_what_to_do(make_dataset):
    folder = make_dataset(100)
    path = folder.path / "train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-00001.parquet cannot be read: expected 32 rows .* import"):
        folder.rows("train").read([40])


def test_a_shard_of_another_import_is_noticed(make_dataset):
    folder, other = make_dataset(100), make_dataset(100, rows_per_group=5, name="other")
    (other.path / "train-00000.parquet").rename(folder.path / "train-00000.parquet")
    with pytest.raises(DataError, match=r"not the one in the index: expected row groups of 8, 8, 8, 8 rows, found 5"):
        _ = folder.rows("train").labels
