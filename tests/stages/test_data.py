import json
import shutil
from pathlib import Path

import pytest

from m2mkd_ray.data import find
from m2mkd_ray.errors import DataError


def test_it_says_what_is_trained_on(chain, data_root: Path) -> None:
    index = find("fashion-mnist-small", str(data_root)).index
    said = json.loads((chain.folder("data") / "data.json").read_text())
    assert said["rows"] == {"train": 160, "test": 40}
    assert said["classes"] == [{"id": entry.id, "name": entry.name} for entry in index.classes]
    assert (said["fingerprint"], said["licence"]) == (index.fingerprint, "MIT")
    assert chain.metrics("data") == {"num_classes": 10, "rows": {"train": 160, "test": 40}}


@pytest.fixture
def copied(chain, data_root: Path, tmp_path: Path):
    """The chain on a copy of the data set that a test may spoil."""
    shutil.copytree(data_root, tmp_path / "copy")
    return chain.with_settings(f"placement.data_root={tmp_path / 'copy'}", "data.validation.split=corrupted")


def test_a_spoilt_shard_is_found_before_anything_is_trained_on_it(copied, tmp_path: Path) -> None:
    stage = copied.stage("data")
    (shard,) = (tmp_path / "copy" / "fashion-mnist-small").glob("corrupted-*.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"split corrupted.*is damaged:\n.*corrupted-00000\.parquet: expected sha256"):
        copied.run(stage)


def test_another_data_set_than_the_plans_is_refused(copied, tmp_path: Path) -> None:
    stage = copied.stage("data")
    index = tmp_path / "copy" / "fashion-mnist-small" / "index.json"
    index.write_text(index.read_text().replace("Trouser", "Trousers"))
    with pytest.raises(
        DataError, match=r"changed after the plan was made: its fingerprint is \w{12}, expected \w{12}"
    ):
        copied.run(stage)
