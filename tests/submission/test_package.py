"""What would be uploaded, against the zip that Ray itself makes."""

from pathlib import Path

import pytest
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import create_package

from m2mkd_ray.errors import UsageError
from m2mkd_ray.submission import LIMIT_BYTES, Package, check_size, find_job, measure, read_job

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what is to be shipped, and what is not."""
    root = tmp_path / "work"
    for name, size in {
        "code/a.py": 1000,
        "code/deep/é.py": 10,
        ".git/objects/pack": 50_000,
        "data/train.parquet": 300_000,
        "code/data/labels.json": 77,
        "code/__pycache__/a.pyc": 5,
        "notes.log": 9,
        "ignored/x": 1234,
        ".venv/lib": 4321,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * size)
    (root / "empty").mkdir()
    (root / ".gitignore").write_text("/ignored\n")
    return root


def test_the_size_is_that_of_rays_zip(folder, tmp_path):
    excludes = ["/data", "*.log"]
    measured = measure({"working_dir": str(folder), "excludes": excludes})
    assert measured is not None
    defaults = [".git", ".venv", "venv", "__pycache__"]
    create_package(str(folder), tmp_path / "p.zip", include_gitignore=True, excludes=[*defaults, *excludes])
    assert measured.size == (tmp_path / "p.zip").stat().st_size
    assert measured.num_files == 4
    assert list(measured.by_top) == ["code", ".gitignore", "empty"]


def test_what_the_shipped_jobs_upload_is_code_and_small():
    environment = read_job(find_job("demo")).runtime_env | {"working_dir": str(ROOT)}
    measured = measure(environment)
    assert measured is not None
    assert {"m2mkd_ray", "jobs", "setup.cfg"} <= measured.by_top.keys()
    assert not {".git", ".venv", "runs", "data", "tests", ".mypy_cache"} & measured.by_top.keys()
    assert measured.size < LIMIT_BYTES / 4
    check_size(measured)


@pytest.mark.parametrize("working_dir", [None, "s3://bucket/code.zip", "code.zip"])
def test_what_is_no_folder_is_not_measured(working_dir):
    assert measure({"working_dir": working_dir}) is None


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"working_dir .*gone is no folder"):
        measure({"working_dir": str(tmp_path / "gone")})


def test_what_the_dashboard_would_not_take_is_refused_with_its_largest_folders():
    assert LIMIT_BYTES == DASHBOARD_CLIENT_MAX_SIZE
    check_size(Package(Path("w"), LIMIT_BYTES - 1, 3, {"a": LIMIT_BYTES - 1}))
    largest = {"images": 300 * 1024**2, "old": 5 * 1024**2, "m2mkd_ray": 1024**2}
    with pytest.raises(UsageError) as refused:
        check_size(Package(Path("w"), sum(largest.values()), 12_345, largest))
    for part in ("12,345 files have 306.0 MiB", "less than 100 MiB", "images (300.0 MiB), old (5.0 MiB)", "excludes"):
        assert part in str(refused.value)
