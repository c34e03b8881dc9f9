from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from m2mkd_ray.data import corrupt, find
from m2mkd_ray.data.index import SHIPPED
from m2mkd_ray.data.pixels import decode
from m2mkd_ray.data.shipped.build import SEVERITY, SHIFTS, build

ORIGINAL = Path("/usr/share/datasets/fashion-mnist")


def test_what_ships_is_whole_small_and_has_its_licence():
    folder = find("fashion-mnist-small")
    for split in folder.index.splits:
        folder.verify(split)
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 12 * 2**20
    assert "MIT License (MIT) Copyright © 2017 Zalando SE" in (SHIPPED / "NOTICE.md").read_text()


def test_every_class_has_as_many_images_in_every_split():
    splits = find("fashion-mnist-small").index.splits
    assert {name: split.rows_per_class for name, split in splits.items()} == {
        "train": (800,) * 10,
        "validation": (200,) * 10,
        "test": (200,) * 10,
        "corrupted": (200,) * 10,
    }


def test_no_image_is_in_two_splits():
    folder = find("fashion-mnist-small")
    files = {split: set(folder.rows(split).paths) for split in ("train", "validation", "test")}
    assert sum(map(len, files.values())) == len(set().union(*files.values())) == 12_000
    assert all(path.startswith("train/") for path in files["validation"])


def test_the_corrupted_images_are_the_test_images_in_order():
    folder = find("fashion-mnist-small")
    test, corrupted = folder.rows("test"), folder.rows("corrupted")
    assert np.array_equal(test.labels, corrupted.labels)
    for row in range(0, 2000, 97):
        _, shift, file = corrupted.paths[row].split("/")
        assert test.paths[row] == f"test/{file}"
        name, severity = shift.rsplit("-", 1)
        clean, spoilt = (np.asarray(decode(rows.read([row])[0]))[..., None] for rows in (test, corrupted))
        assert np.array_equal(spoilt, corrupt(clean, name, int(severity), int(Path(file).stem)))


def test_every_corruption_is_as_frequent_in_every_class():
    rows = find("fashion-mnist-small").rows("corrupted")
    found = Counter(zip((path.split("/")[1] for path in rows.paths), rows.labels.tolist()))
    assert found == {(f"{shift}-{SEVERITY}", label): 25 for shift in SHIFTS for label in range(10)}


@pytest.mark.skipif(not ORIGINAL.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_building_again_gives_the_same_bytes(tmp_path):
    one = build(ORIGINAL, tmp_path / "one", train_rows=100, validation_rows=60, test_rows=80)
    two = build(ORIGINAL, tmp_path / "two", train_rows=100, validation_rows=60, test_rows=80)
    assert one == two
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    assert {name: split.rows for name, split in one.splits.items()} == {
        "train": 100,
        "validation": 60,
        "test": 80,
        "corrupted": 80,
    }
