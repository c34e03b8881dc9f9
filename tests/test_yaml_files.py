"""Files that people write."""

from pathlib import Path

import pytest

from m2mkd_ray.errors import UsageError
from m2mkd_ray.yaml_files import read_mapping


def test_a_file_is_read_as_utf_8(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("from: demo\ntitle: Größe\n".encode())
    assert read_mapping(tmp_path / "mine.yaml", "recipe file", "settings") == {"from": "demo", "title": "Größe"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"Cannot read the recipe file .*/mine\.yaml: No such file"),
        ("title: Größe".encode("latin-1"), r"The recipe file .*/mine\.yaml is not YAML: 'utf-8' codec can't decode"),
        (b"from: [demo\n", r"The recipe file .*/mine\.yaml is not YAML: while parsing"),
        (b"day: 2026-02-30\n", r"The recipe file .*/mine\.yaml is not YAML: day"),
        (b"- from\n", r"The recipe file .*/mine\.yaml holds \['from'\], expected settings by name"),
        (b"", r"The recipe file .*/mine\.yaml holds None, expected settings by name"),
    ],
)
def test_a_file_that_holds_no_mapping_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_mapping(file, "recipe file", "settings by name")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot read the job file .*: Is a directory"):
        read_mapping(tmp_path, "job file", "settings by name")
