import pytest

from m2mkd_ray.data import DATASETS, find
from m2mkd_ray.data.index import INDEX, JOURNAL, DatasetFolder
from m2mkd_ray.errors import DataError


def test_a_sound_data_set_verifies(make_dataset):
    make_dataset(100).verify("train")


def test_every_damaged_shard_is_named(make_dataset):
    folder = make_dataset(100)
    first, second, third = (folder.path / f"train-0000{i}.parquet" for i in range(3))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.write_bytes(third.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError) as caught:
        folder.verify("train")
    message = str(caught.value)
    assert "train-00000.parquet: missing" in message
    assert f"train-00001.parquet: expected {second.stat().st_size + 1} bytes, found {second.stat().st_size}" in message
    assert "train-00002.parquet: expected sha256" in message


def test_the_fingerprint_stands_for_the_contents_not_for_the_name(make_dataset):
    one, same, other = make_dataset(50), make_dataset(50, name="same"), make_dataset(51, name="other")
    assert one.index.fingerprint == same.index.fingerprint != other.index.fingerprint
    assert len(one.index.fingerprint) == 12


def test_an_unknown_split_lists_the_known_ones(make_dataset):
    with pytest.raises(DataError, match="no split 'val', only train"):
        make_dataset(10).rows("val")


def test_find_prefers_the_data_root(make_dataset):
    folder = make_dataset(10, name="fashion-mnist-small")
    assert find("fashion-mnist-small", str(folder.path.parent)).path == folder.path
    assert find("fashion-mnist-small").index.splits["train"].rows == 8000


def test_a_known_data_set_that_is_absent_comes_with_its_command(tmp_path):
    with pytest.raises(DataError, match="m2mkd data import cifar"):
        find("cifar10", str(tmp_path))


def test_an_unknown_data_set_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError, match="Known data sets: fashion-mnist-small, "):
        find("cifar11", str(tmp_path))


def test_an_interrupted_import_is_recognised(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / JOURNAL).write_text("{}")
    with pytest.raises(DataError, match="was interrupted: give the same command again"):
        find("cifar10", str(tmp_path))


def test_an_index_of_another_form_is_refused(tmp_path):
    (tmp_path / INDEX).write_text('{"name": "x"}')
    with pytest.raises(DataError, match="not an index of this version"):
        DatasetFolder.open(tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_catalog_entries_are_complete(name):
    entry = DATASETS[name]
    assert entry.name == name
    assert entry.classes > 1
    assert all((entry.title, entry.splits, entry.licence, entry.source, entry.how))
