import hashlib
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

from m2mkd_ray.data.importers.source import Sample, Source, SplitSource, png
from m2mkd_ray.data.importers.write import WriteConfig, write
from m2mkd_ray.data.index import INDEX, JOURNAL, ClassName, DatasetFolder
from m2mkd_ray.errors import DataError

CONFIG = WriteConfig(name="set", rows_per_group=4, groups_per_shard=2)


def source(num_rows=50, shuffle=True, read=None, label=None):
    """Row i is a picture of the value i with label i modulo 2."""

    def sample(number):
        image = partial(png, np.full((4, 4), number, dtype=np.uint8))
        return Sample(
            f"{number}.png",
            number % 2 if label is None else label(number),
            image if read is None else partial(read, number, image),
        )

    splits = {
        "train": SplitSource(num_rows, sample, shuffle, needs_every_class=True),
        "val": SplitSource(10, sample, shuffle),
    }
    return Source((ClassName(id="a", name="A"), ClassName(id="b", name="B")), splits, licence="MIT", origin="test")


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class Killed(BaseException):
    """Stands for whatever ends a process."""


def test_everything_arrives_once_and_the_index_comes_last(tmp_path):
    index = write(source(), tmp_path, CONFIG)
    folder = DatasetFolder.open(tmp_path / "set")
    assert folder.index == index
    assert sorted(folder.rows("train").paths) == sorted(f"{i}.png" for i in range(50))
    assert index.splits["train"].rows_per_class == (25, 25)
    assert index.splits["train"].rows == len(folder.rows("train")) == 50
    assert [int(path[:-4]) % 2 for path in folder.rows("train").paths] == folder.rows("train").labels.tolist()
    assert not (folder.path / JOURNAL).exists()


def test_rows_are_shuffled_by_the_seed_or_kept_in_order(tmp_path):
    def paths(shuffle, seed, name):
        write(source(shuffle=shuffle), tmp_path, CONFIG.model_copy(update={"seed": seed, "name": name}))
        return DatasetFolder.open(tmp_path / name).rows("train").paths

    assert paths(True, 0, "a") == paths(True, 0, "b") != paths(True, 1, "c")
    assert paths(False, 0, "d") == [f"{i}.png" for i in range(50)]


@pytest.mark.parametrize("after", [1, 8, 9, 30, 50, 55])
def test_an_interrupted_import_goes_on_and_ends_with_the_same_bytes(after, tmp_path):
    write(source(), tmp_path / "whole", CONFIG)
    seen = []

    def interrupt(split, done, rows):
        seen.append(split)
        if len(seen) == after:
            raise Killed

    with pytest.raises(Killed):
        write(source(), tmp_path / "cut", CONFIG, on_progress=interrupt)
    assert not (tmp_path / "cut" / "set" / INDEX).exists()
    write(source(), tmp_path / "cut", CONFIG)
    assert hashes(tmp_path / "cut" / "set") == hashes(tmp_path / "whole" / "set")


def test_what_was_written_is_not_read_again(tmp_path):
    read = []

    def noted(number, image):
        read.append(number)
        return image()

    def interrupt(split, done, rows):
        if done == 30:
            raise Killed

    with pytest.raises(Killed):
        write(source(read=noted), tmp_path, CONFIG, on_progress=interrupt)
    read.clear()
    write(source(read=noted), tmp_path, CONFIG)
    assert len(read) == 50 - 24 + 10  # 24 rows are in whole shards


@pytest.mark.slow
def test_an_import_that_is_killed_by_a_signal_goes_on(tmp_path):
    script = (
        "import numpy as np, sys, time\n"
        "from pathlib import Path\n"
        "from m2mkd_ray.data import import_data\n"
        "slow = (lambda *args: time.sleep(0.05)) if sys.argv[3] == 'slow' else None\n"
        "import_data('npz', Path(sys.argv[1]), 'set', Path(sys.argv[2]), rows_per_group=2, on_progress=slow)\n"
    )
    np.savez(
        tmp_path / "x.npz", images=np.arange(200 * 16, dtype=np.uint8).reshape(200, 4, 4), labels=np.arange(200) % 2
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x.npz")]
    subprocess.run([*command, str(tmp_path / "whole"), "fast"], check=True)
    process = subprocess.Popen([*command, str(tmp_path / "cut"), "slow"])
    while not list((tmp_path / "cut").glob("set/train-00001.parquet")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "cut" / "set" / JOURNAL).exists()
    subprocess.run([*command, str(tmp_path / "cut"), "fast"], check=True)
    assert hashes(tmp_path / "cut" / "set") == hashes(tmp_path / "whole" / "set")


def test_a_whole_shard_that_vanished_is_made_again(tmp_path):
    write(source(), tmp_path / "whole", CONFIG)

    def interrupt(split, done, rows):
        if done == 30:
            raise Killed

    with pytest.raises(Killed):
        write(source(), tmp_path, CONFIG, on_progress=interrupt)
    (tmp_path / "set" / "train-00001.parquet").unlink()
    write(source(), tmp_path, CONFIG)
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole" / "set")


def test_importing_again_does_nothing(tmp_path):
    index = write(source(), tmp_path, CONFIG)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    assert write(source(), tmp_path, CONFIG) == index
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before


def test_another_import_under_the_same_name_is_refused(tmp_path):
    write(source(), tmp_path, CONFIG)
    with pytest.raises(DataError, match="holds a data set that was imported with"):
        write(source(), tmp_path, CONFIG.model_copy(update={"imported": {"kind": "other"}}))
    with pytest.raises(DataError, match="holds a data set that was imported with"):
        write(source(), tmp_path, CONFIG.model_copy(update={"limit": 5}))


def test_the_beginning_of_another_import_is_refused(tmp_path):
    def interrupt(split, done, rows):
        if done == 30:
            raise Killed

    with pytest.raises(Killed):
        write(source(), tmp_path, CONFIG, on_progress=interrupt)
    with pytest.raises(DataError, match="holds the beginning of another import"):
        write(source(), tmp_path, CONFIG.model_copy(update={"seed": 1}))


def spoilt(number, image):
    if number == 7:
        raise FileNotFoundError("no such file")
    return image()[:-30] if number in (3, 12) else image()


def odd_label(number):
    return "n999" if number == 20 else 2 if number == 21 else number % 2


def test_the_first_problem_is_named_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"split train .* undecodable image: 3.png: .* --on-bad skip"):
        write(source(shuffle=False, read=spoilt), tmp_path, CONFIG)
    with pytest.raises(DataError, match=r"unknown label: 20.png: label 'n999' is none of the 2 classes"):
        write(source(shuffle=False, label=odd_label), tmp_path, CONFIG.model_copy(update={"name": "other"}))


def test_problems_are_left_out_counted_and_logged_when_asked(tmp_path, caplog):
    index = write(source(shuffle=False, read=spoilt, label=odd_label), tmp_path, CONFIG, on_bad="skip")
    train = index.splits["train"]
    assert train.bad == {"missing image": 1, "undecodable image": 2, "unknown label": 2}
    assert train.rows == sum(train.rows_per_class) == 45
    left = DatasetFolder.open(tmp_path / "set").rows("train").paths
    assert left == [f"{i}.png" for i in range(50) if i not in (3, 7, 12, 20, 21)]
    assert len([record for record in caplog.records if "left out" in record.message]) == 5 + 2  # val has 3 and 7 too


def test_an_import_that_failed_goes_on_with_skip(tmp_path):
    bad = source(shuffle=False, read=lambda number, image: image()[:-30] if number == 30 else image())
    write(bad, tmp_path / "whole", CONFIG, on_bad="skip")
    with pytest.raises(DataError, match=r"30\.png"):
        write(bad, tmp_path, CONFIG)
    write(bad, tmp_path, CONFIG, on_bad="skip")
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole" / "set")


def test_a_class_without_images_is_a_problem_in_the_training_split_only(tmp_path):
    only_a = source(label=lambda number: 0)
    with pytest.raises(DataError, match="Importing split train met a problem, empty class: class b has no images"):
        write(only_a, tmp_path, CONFIG)
    index = write(only_a, tmp_path, CONFIG, on_bad="skip")
    assert index.splits["train"].bad == {"empty class": 1}
    assert index.splits["val"].bad == {}


def test_a_limit_takes_the_first_rows_of_the_order(tmp_path):
    write(source(), tmp_path, CONFIG)
    write(source(), tmp_path, CONFIG.model_copy(update={"limit": 6, "name": "few"}))
    few, whole = (DatasetFolder.open(tmp_path / name).rows("train").paths for name in ("few", "set"))
    assert few == whole[:6]


def test_progress_reaches_the_number_of_rows(tmp_path):
    seen = []
    write(source(), tmp_path, CONFIG, on_progress=lambda *progress: seen.append(progress))
    assert seen[0] == ("train", 1, 50)
    assert ("train", 50, 50) in seen
    assert seen[-1] == ("val", 10, 10)
